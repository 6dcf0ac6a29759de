"""layer_norm_attention against the float64 oracle, torch and its own parts, at every level."""

import pytest
import torch
from test_linear import normal
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.ops.random import dropout_factors
from gptfast.testing import autocast, check_op, run

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1, 8, 1), (3, 16, 32, 2), (2, 70, 96, 3), (1, 150, 33, 1), (40, 9, 24, 4))


def attention_block(B: int, T: int, C: int, bias: bool = True) -> list[Tensor | None]:
    """x, ln_w, ln_b, w_qkv, b_qkv, w_proj, b_proj."""
    ln_b, b_qkv, b_proj = (normal(n, seed=2) if bias else None for n in (C, 3 * C, C))
    w_qkv, w_proj = normal(3 * C, C) * C**-0.5, normal(C, C, seed=3) * C**-0.5
    return [normal(B, T, C), normal(C, seed=1), ln_b, w_qkv, b_qkv, w_proj, b_proj]


def torch_layer_norm_attention(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor | None,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    n_head: int,
    proj_dropout_p: float = 0.0,
    seed: int = 0,
    proj_stream: int = 0,
) -> Tensor:
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], ln_w, ln_b), w_qkv, b_qkv)
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = F.linear(y.transpose(1, 2).flatten(2), w_proj, b_proj)
    rows, columns = y.shape[:-1].numel(), y.shape[-1]
    key = torch.tensor(seed, device=x.device)
    factors = dropout_factors(proj_dropout_p, key, proj_stream, 1, rows, columns)
    return x + y * factors.view(y.shape).to(y)


OPS = (ops.layer_norm_attention, reference.layer_norm_attention)


PROJ_DROPOUT = {"proj_dropout_p": 0.3, "seed": 77, "proj_stream": 5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dropout", ({}, PROJ_DROPOUT))
@pytest.mark.parametrize(("B", "T", "C", "H"), SHAPES)
def test_budget(
    isa: str, B: int, T: int, C: int, H: int, dropout: dict, bias: bool, dtype: torch.dtype
) -> None:
    inputs = attention_block(B, T, C, bias)
    check_op(*OPS, torch_layer_norm_attention, inputs, dtype, n_head=H, **dropout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_dropouts_at_once(isa: str, dtype: torch.dtype) -> None:
    inputs = [x if x is None else x.to(dtype) for x in attention_block(3, 40, 32)]
    grad = normal(3, 40, 32, seed=9).to(dtype)
    options = {"n_head": 2, "dropout_p": 0.2, "stream": 1, **PROJ_DROPOUT}
    oracle = run(reference.layer_norm_attention, inputs, torch.float64, grad, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, o in zip(run(OPS[0], inputs, dtype, grad, **options), oracle, strict=True):
        assert (a.double() - o).abs().max() <= tolerance * o.abs().max()
    everything = {**options, "proj_dropout_p": 1.0}  # x remains
    assert torch.equal(ops.layer_norm_attention(*inputs, **everything), inputs[0])


@pytest.mark.parametrize(("B", "T", "C", "H"), SHAPES[1:])
def test_mixed_precision_keeps_to_the_budget(isa: str, B: int, T: int, C: int, H: int) -> None:
    args = (*OPS, autocast(torch_layer_norm_attention), attention_block(B, T, C))
    check_op(*args, torch.bfloat16, activations=(0,), n_head=H)


def by_parts(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor,
    w_proj: Tensor,
    b_proj: Tensor,
    *,
    n_head: int,
    **options: float,
) -> Tensor:
    qkv = ops.layer_norm_linear(x, ln_w, ln_b, w_qkv, b_qkv).unflatten(-1, (3, n_head, -1))
    y = ops.causal_attention(*qkv.permute(2, 0, 3, 1, 4), **options)
    return ops.linear_residual(y.transpose(1, 2).flatten(2), w_proj, b_proj, x)


def assert_bits_of_parts(whole: list[Tensor], parts: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(whole, parts, strict=True)):
        if i == 1:  # the kernel sums the gradients of x before it rounds
            bound = 2 * torch.finfo(a.dtype).eps * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=bound)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize(("B", "T", "C", "H"), SHAPES)
def test_it_has_the_bits_of_its_parts(
    isa: str, B: int, T: int, C: int, H: int, dropout_p: float, dtype: torch.dtype
) -> None:
    inputs = [x if x is None else x.to(dtype) for x in attention_block(B, T, C)]
    options = {"n_head": H, "dropout_p": dropout_p, "seed": 8, "stream": 2}
    grad = normal(B, T, C, seed=9).to(dtype)
    whole = run(ops.layer_norm_attention, inputs, dtype, grad, **options)
    parts = run(by_parts, inputs, dtype, grad, **options)
    assert_bits_of_parts(whole, parts)
    with torch.no_grad():
        assert torch.equal(ops.layer_norm_attention(*inputs, **options), whole[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_have_the_bits_they_have_alone(isa: str, dtype: torch.dtype) -> None:
    x, *params = (None if t is None else t.to(dtype) for t in attention_block(5, 150, 96))
    assert x is not None
    x, dy = x.requires_grad_(), normal(5, 150, 96, seed=4).to(dtype)
    options = {"n_head": 3, "dropout_p": 0.0}
    whole = ops.layer_norm_attention(x, *params, **options)
    (dx,) = torch.autograd.grad(whole, x, dy)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = ops.layer_norm_attention(x[3:4], *params, **options)
        assert torch.equal(alone, whole[3:4])
        assert torch.equal(torch.autograd.grad(alone, x, dy[3:4])[0][3:4], dx[3:4])


@pytest.mark.parametrize("shape", ((30, 60, 64), (1, 140, 96)))  # the second: by columns, too
def test_gradients_do_not_depend_on_the_number_of_threads(
    isa: str, shape: tuple[int, int, int]
) -> None:
    leaves = [t.requires_grad_() for t in attention_block(*shape) if t is not None]
    grads = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        options = {"dropout_p": 0.2, "proj_dropout_p": 0.3, "proj_stream": 1, "seed": 1}
        out = ops.layer_norm_attention(*leaves, n_head=2, **options)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_strides_and_empty_batches(isa: str) -> None:
    x, *params = attention_block(4, 9, 32)
    assert x is not None
    whole = ops.layer_norm_attention(x, *params, n_head=2)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.layer_norm_attention(turned, *params, n_head=2), whole)
    for shape in ((0, 9, 32), (4, 0, 32)):
        leaves = [torch.zeros(shape).requires_grad_(), params[2].clone().requires_grad_()]
        out = ops.layer_norm_attention(leaves[0], *params[:2], leaves[1], *params[3:], n_head=2)
        dx, dweight = torch.autograd.grad(out.sum(), leaves)
        assert out.shape == dx.shape == shape and (dweight == 0).all()


def test_errors_name_argument_expected_and_got() -> None:
    x, *params = attention_block(2, 4, 12)
    call = ops.layer_norm_attention
    with pytest.raises(ValueError, match=r"layer_norm_attention: x must have 3 dimensions"):
        call(x[0], *params, n_head=2)
    for n_head in (5, 0, -3):
        with pytest.raises(
            ValueError, match=rf"columns that n_head={n_head} divides, got shape \(2, 4, 12\)"
        ):
            call(x, *params, n_head=n_head)
    with pytest.raises(ValueError, match=r"w_qkv must have shape \(36, 12\), got \(12, 12\)"):
        call(x, *params[:2], params[4], *params[3:], n_head=2)
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\], got 1.5"):
        call(x, *params, n_head=2, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"proj_dropout_p must be in \[0, 1\], got -1"):
        call(x, *params, n_head=2, proj_dropout_p=-1)
    with pytest.raises(RuntimeError, match=r"gptfast::self_attention: x must be \(B, T, C\)"):
        torch.ops.gptfast.self_attention(x, *params, 5, 0.0, 0, 0.0, None, 0, False)
