"""Linear layers with LayerNorm before or a residual after, in one pass over the activations.

Letters: M rows of an activation (all leading dimensions), K its columns, N columns of the result.
"""

from typing import Any

import torch
from torch import Tensor

from gptfast.ops.common import (
    check_activation,
    check_like,
    check_param,
    check_tensor,
    define,
    once_differentiable,
)


def absent_to_none(
    grads: tuple[Tensor, ...], params: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the parameters that exist; operators return an empty tensor for others."""
    return tuple(None if param is None else grad for grad, param in zip(grads, params, strict=True))


def fake_grad(param: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns for a parameter's gradient."""
    return like.new_empty(0, dtype=torch.float32) if param is None else param.new_empty(param.shape)


def _fake_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    rows = 0 if norm_weight is None else x.numel() // x.shape[-1]
    moments = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), *moments


def _fake_linear_backward(dy: Tensor, x: Tensor, *args: Tensor | None) -> tuple[Tensor, ...]:
    norm_weight, norm_bias, _, _, weight, bias = args
    grads = (fake_grad(param, x) for param in (norm_weight, norm_bias, weight, bias))
    return x.new_empty(x.shape), *grads


_linear = define(
    """
    linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias,
        Tensor? residual) -> (Tensor y, Tensor mean, Tensor rstd)
    """,
    _fake_linear,
)
_linear_backward = define(
    """
    linear_backward(Tensor dy, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor mean,
        Tensor rstd, Tensor weight, Tensor? bias)
        -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight, Tensor dbias)
    """,
    _fake_linear_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor | None) -> Tensor:
        norm_weight, norm_bias, weight, bias, residual = params
        y, mean, rstd = _linear(x, norm_weight, norm_bias, weight, bias, residual)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight, bias)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, norm_weight, norm_bias, mean, rstd, weight, bias = ctx.saved_tensors
        dx, *grads = _linear_backward(dy, x, norm_weight, norm_bias, mean, rstd, weight, bias)
        params = absent_to_none(tuple(grads), (norm_weight, norm_bias, weight, bias))
        return dx, *params, dy if ctx.has_residual else None


def layer_norm_linear(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Computes LayerNorm(x) weight' + bias; eps 1e-5, statistics in float32, variance two-pass.

    Args:
        x: (..., K), float32 or bfloat16.
        ln_w: (K,), float32 or x's dtype, as are all parameters; gradients have the parameter's
            dtype.
        ln_b: (K,) or None.
        weight: (N, K), contiguous, as nn.Linear keeps it.
        bias: (N,) or None.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        BackendError: There are no fused kernels for the device or dtype.
    """
    op = "layer_norm_linear"
    check_activation(op, "x", x)
    check_tensor(op, "weight", weight, 2)
    K, N = x.shape[-1], weight.shape[0]
    check_param(op, "ln_w", ln_w, x, (K,))
    check_param(op, "ln_b", ln_b, x, (K,))
    check_param(op, "weight", weight, x, (N, K))
    check_param(op, "bias", bias, x, (N,))
    return _Linear.apply(x, ln_w, ln_b, weight, bias, None)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Computes residual + x weight' + bias.

    Args:
        x: (..., K), float32 or bfloat16.
        weight: (N, K), contiguous, float32 or x's dtype.
        bias: (N,) or None.
        residual: (..., N), like x.

    Returns:
        (..., N) in x's dtype.
    """
    op = "linear_residual"
    check_activation(op, "x", x)
    check_tensor(op, "weight", weight, 2)
    N = weight.shape[0]
    check_param(op, "weight", weight, x, (N, x.shape[-1]))
    check_param(op, "bias", bias, x, (N,))
    check_like(op, "residual", residual, x, (*x.shape[:-1], N))
    return _Linear.apply(x, None, None, weight, bias, residual)
