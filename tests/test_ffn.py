"""layer_norm_ffn against the float64 oracle and torch, at every instruction set."""

import math

import pytest
import torch
from peers import ffn as torch_ffn
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import autocast, check_op

DTYPES = (torch.float32, torch.bfloat16)
GELU_ERROR = {torch.float32: 4e-7, torch.bfloat16: 7e-5}  # relative to 1 + |GELU's input|


def block(M: int, C: int, hidden: int, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(M + C + hidden)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    b1, b2, ln_b = (normal(hidden), normal(C), normal(C)) if bias else (None, None, None)
    w1, w2 = normal(hidden, C, scale=C**-0.5), normal(C, hidden, scale=hidden**-0.5)
    return [normal(M, C), normal(C), ln_b, w1, b1, w2, b2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", ("erf", "tanh"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize(
    ("M", "C", "hidden"),
    ((1, 16, 64), (33, 20, 80), (250, 128, 512), (97, 192, 768), (5, 7, 11), (1700, 9, 21)),
)
def test_budget(
    isa: str, M: int, C: int, hidden: int, dropout_p: float, gelu: str, dtype: torch.dtype
) -> None:
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn)
    check_op(*args, block(M, C, hidden), dtype, gelu=gelu, dropout_p=dropout_p, seed=77)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_biases(isa: str, dtype: torch.dtype) -> None:
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn)
    check_op(*args, block(40, 32, 128, bias=False), dtype)


@pytest.mark.parametrize(("M", "C", "hidden"), ((33, 20, 80), (97, 192, 768), (1700, 9, 21)))
def test_mixed_precision_keeps_to_the_budget(isa: str, M: int, C: int, hidden: int) -> None:
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, autocast(torch_ffn))
    options = {"dropout_p": 0.3, "seed": 77}
    check_op(*args, block(M, C, hidden), torch.bfloat16, activations=(0,), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", ("erf", "tanh"))
def test_gelu_over_its_whole_range(isa: str, gelu: str, dtype: torch.dtype) -> None:
    # LayerNorm leaves rows of +-1 unchanged, so its weight sets the input of GELU, -14 to 14.
    # The second bias cancels the residual, which would hide small values.
    C = 512
    weight, eye = torch.linspace(0, 14, C).to(dtype), torch.eye(C, dtype=dtype)
    for sign in (1.0, -1.0):
        x = torch.full((1, C), sign, dtype=dtype)
        x[:, ::2] = -sign
        out = ops.layer_norm_ffn(x, weight, None, eye, None, eye, -x[0], gelu=gelu)
        hidden = F.layer_norm(x.double(), (C,)) * weight
        expected = F.gelu(hidden, approximate="none" if gelu == "erf" else "tanh")
        bound = torch.finfo(dtype).eps * expected.abs() + GELU_ERROR[dtype] * (1 + hidden.abs())
        assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", ("erf", "tanh"))
def test_gelu_of_infinity_shows(isa: str, gelu: str, dtype: torch.dtype) -> None:
    x, w1, w2 = torch.tensor([[1.0, -1.0]], dtype=dtype), torch.zeros(1, 2), torch.ones(2, 1)

    def of(bias: float) -> Tensor:
        params = torch.ones(2), None, w1, torch.tensor([bias]), w2, None
        return ops.layer_norm_ffn(x, *params, gelu=gelu)

    assert (of(math.inf) == math.inf).all()  # as torch's, whose GELU(-inf) is NaN
    assert not of(-math.inf).isfinite().any()
    assert (of(1e38) >= 0.99e38).all()
    assert (of(-1e38).abs() <= GELU_ERROR[dtype] * 1e38).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_bits_they_have_alone(isa: str, dtype: torch.dtype) -> None:
    x, *params = (None if t is None else t.to(dtype) for t in block(130, 96, 384))
    assert x is not None
    whole = ops.layer_norm_ffn(x, *params)
    for rows in (slice(0, 1), slice(129, 130), slice(90, 101)):
        assert torch.equal(ops.layer_norm_ffn(x[rows], *params), whole[rows])
    x, dy = x.requires_grad_(), whole.flip(0)
    (dx,) = torch.autograd.grad(ops.layer_norm_ffn(x, *params), x, dy)
    for rows in (slice(0, 1), slice(129, 130), slice(40, 101)):
        part = ops.layer_norm_ffn(x[rows], *params)
        assert torch.equal(torch.autograd.grad(part, x, dy[rows])[0][rows], dx[rows])


@pytest.mark.parametrize("rows", [400, 1700])  # 1700: summed in parts
def test_gradients_do_not_depend_on_the_number_of_threads(isa: str, rows: int) -> None:
    leaves = [t.requires_grad_() for t in block(rows, 64, 256) if t is not None]
    grads = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = ops.layer_norm_ffn(*leaves, dropout_p=0.2, seed=1)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_errors_name_argument_expected_and_got() -> None:
    x, *params = block(4, 8, 32)
    with pytest.raises(
        ValueError, match=r"layer_norm_ffn: w2 must have shape \(8, 32\), got \(32, 8\)"
    ):
        ops.layer_norm_ffn(x, *params[:4], params[2], None)
    with pytest.raises(ValueError, match=r"gelu must be one of \('erf', 'tanh'\), got 'relu'"):
        ops.layer_norm_ffn(x, *params, gelu="relu")
