"""layer_norm_linear and linear_residual against the float64 oracle and torch, at every level."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import autocast, check_op

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = (
    (1, 16, 5),
    (2, 1, 1),
    (7, 33, 70),
    (97, 64, 1000),
    (200, 128, 384),
    (300, 600, 40),
    (40, 1000, 33),
    (1700, 9, 21),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def torch_layer_norm_linear(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], ln_w, ln_b), weight, bias)


def torch_linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    return residual + F.linear(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_layer_norm_linear(
    isa: str, M: int, K: int, N: int, bias: bool, dtype: torch.dtype
) -> None:
    if K == 1:
        pytest.skip("the norm of one column is its bias: nothing to compare")
    ln_b, b = (normal(K, seed=1), normal(N, seed=2)) if bias else (None, None)
    inputs = [normal(M, K) * 2 + 1, normal(K, seed=3), ln_b, normal(N, K), b]
    args = (ops.layer_norm_linear, reference.layer_norm_linear, torch_layer_norm_linear)
    check_op(*args, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_linear_residual(isa: str, M: int, K: int, N: int, dtype: torch.dtype) -> None:
    inputs = [normal(M, K), normal(N, K), normal(N, seed=2), normal(M, N, seed=3)]
    check_op(ops.linear_residual, reference.linear_residual, torch_linear_residual, inputs, dtype)


def test_mean_far_from_zero_costs_no_digits(isa: str) -> None:
    inputs = [normal(50, 64) + 1000.0, normal(64, seed=1), None, normal(32, 64), None]
    args = (ops.layer_norm_linear, reference.layer_norm_linear, torch_layer_norm_linear)
    check_op(*args, inputs, torch.float32)


@pytest.mark.parametrize(("M", "K", "N"), SHAPES[2:])
def test_mixed_precision_keeps_to_the_budget(isa: str, M: int, K: int, N: int) -> None:
    inputs = [normal(M, K), normal(K, seed=3), normal(K, seed=1), normal(N, K), normal(N, seed=2)]
    args = (ops.layer_norm_linear, reference.layer_norm_linear, autocast(torch_layer_norm_linear))
    check_op(*args, inputs, torch.bfloat16, activations=(0,))
    inputs = [normal(M, K), normal(N, K), normal(N, seed=2), normal(M, N, seed=3)]
    args = (ops.linear_residual, reference.linear_residual, autocast(torch_linear_residual))
    check_op(*args, inputs, torch.bfloat16, activations=(0, 3))


def test_float32_parameters_with_bfloat16_activations(isa: str) -> None:
    x = normal(60, 48).bfloat16().requires_grad_()
    params = [normal(48, seed=1), normal(48, seed=2), normal(80, 48), normal(80, seed=3)]
    params = [param.requires_grad_() for param in params]
    out = ops.layer_norm_linear(x, *params)
    grads = torch.autograd.grad(out, [x, *params], torch.ones_like(out))
    assert out.dtype == grads[0].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads[1:])
    wide = [t.detach().double().requires_grad_() for t in (x, *params)]
    expected = reference.layer_norm_linear(*wide)
    assert torch.allclose(out.double(), expected, rtol=0.02, atol=0.1)
    for got, want in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert (got.double() - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_bits_they_have_alone(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = normal(150, 800).to(dtype), normal(90, 800).to(dtype), normal(90).to(dtype)
    residual = normal(150, 90).to(dtype)
    whole = ops.linear_residual(x, weight, bias, residual)
    for rows in (slice(0, 1), slice(149, 150), slice(3, 10), slice(20, 116)):
        assert torch.equal(ops.linear_residual(x[rows], weight, bias, residual[rows]), whole[rows])
    x, dy = x.requires_grad_(), normal(150, 90, seed=3).to(dtype)
    norm, params = normal(800, seed=1), (weight, bias)
    (dx,) = torch.autograd.grad(ops.layer_norm_linear(x, norm, None, *params), x, dy)
    for rows in (slice(0, 1), slice(149, 150), slice(20, 116)):
        part = ops.layer_norm_linear(x[rows], norm, None, *params)
        assert torch.equal(torch.autograd.grad(part, x, dy[rows])[0][rows], dx[rows])


@pytest.mark.parametrize("rows", [500, 1700])  # 1700: summed in parts
def test_gradients_do_not_depend_on_the_number_of_threads(isa: str, rows: int) -> None:
    x = normal(rows, 96).requires_grad_()
    params = [normal(96, seed=1), normal(96, seed=2), normal(64, 96), normal(64, seed=3)]
    params = [param.requires_grad_() for param in params]
    grads = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = ops.layer_norm_linear(x, *params)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *params]))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_leading_dimensions_and_strides(isa: str) -> None:
    x, weight, bias = normal(4, 9, 32), normal(16, 32), normal(16)
    flat = ops.linear_residual(x.reshape(36, 32), weight, bias, torch.zeros(36, 16))
    assert torch.equal(
        ops.linear_residual(x, weight, bias, torch.zeros(4, 9, 16)).reshape(36, 16), flat
    )
    turned = x.transpose(0, 1)
    assert torch.equal(
        ops.linear_residual(turned, weight, bias, torch.zeros(9, 4, 16)),
        flat.reshape(4, 9, 16).transpose(0, 1),
    )


def test_no_rows(isa: str) -> None:
    weight = normal(16, 32).requires_grad_()
    out = ops.linear_residual(torch.zeros(0, 32), weight, None, torch.zeros(0, 16))
    out.sum().backward()
    assert out.shape == (0, 16) and weight.grad is not None and (weight.grad == 0).all()


def test_errors_name_argument_expected_and_got() -> None:
    x, weight = normal(4, 8), normal(6, 8)
    with pytest.raises(
        ValueError, match=r"layer_norm_linear: ln_w must have shape \(8,\), got \(7,\)"
    ):
        ops.layer_norm_linear(x, normal(7), None, weight, None)
    with pytest.raises(ValueError, match=r"linear_residual: residual must have shape \(4, 6\)"):
        ops.linear_residual(x, weight, None, x)
    with pytest.raises(TypeError, match=r"weight must be torch.float32 or .*, got torch.float64"):
        ops.linear_residual(x, weight.double(), None, normal(4, 6))
