"""Linear layers with LayerNorm before or a residual after, in one pass over the activations.

Letters: M rows of an activation (all leading dimensions), K its columns, N columns of the result.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.arguments import Table, activation, affine
from gptfast.ops.autograd import Fused, backward_of, needs_grad, nothing, only_wanted, wanted
from gptfast.ops.flops import of_product, of_product_backward
from gptfast.ops.library import define, public


def fake_grad(param: Tensor | None, like: Tensor, want: bool = True) -> Tensor:
    """Makes an operator's fake gradient of a parameter; empty if absent or not wanted."""
    if param is None or not want:
        return like.new_empty(0, dtype=torch.float32)
    return param.new_empty(param.shape)


def fake_grads(x: Tensor, params: tuple[Tensor | None, ...], wanted: int) -> tuple[Tensor, ...]:
    """Makes a backward's fake gradients of x and of the parameters."""
    dx = x.new_empty(x.shape if wanted & 0b111 else 0)  # the norm's gradients need dx too
    return dx, *(fake_grad(p, x, bool(wanted >> i & 1)) for i, p in enumerate(params, 1))


def _fake_linear(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    rows = 0 if ln_w is None else math.prod(x.shape[:-1])
    moments = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), *moments


def _fake_linear_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    ln_w, ln_b, _, _, weight, bias, wanted = args
    return fake_grads(x, (ln_w, ln_b, weight, bias), wanted)


def _linear_backward_flops(dy: Any, x: Any, *args: Any) -> int:
    *_, weight, _, wanted = args
    return of_product_backward(x, weight, wanted & 0b111, wanted & 0b1000)


_linear = define(
    """
    linear(Tensor x, Tensor? ln_w, Tensor? ln_b, Tensor weight, Tensor? bias,
        Tensor? residual) -> (Tensor y, Tensor mean, Tensor rstd)
    """,
    _fake_linear,
    lambda x, ln_w, ln_b, weight, *_: of_product(x, weight),
)
# wanted: see gptfast.ops.autograd.wanted; the results are in the order of its bits.
_linear_backward = define(
    """
    linear_backward(Tensor dy, Tensor x, Tensor? ln_w, Tensor? ln_b, Tensor mean,
        Tensor rstd, Tensor weight, Tensor? bias, int wanted)
        -> (Tensor dx, Tensor dln_w, Tensor dln_b, Tensor dweight, Tensor dbias)
    """,
    _fake_linear_backward,
    _linear_backward_flops,
)


class _LayerNormLinear(Fused):
    op = "layer_norm_linear"

    @staticmethod
    def forward(x: Tensor, *params: Tensor | None) -> Any:
        return _linear(x, *params, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ln_w, ln_b, weight, bias = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, ln_w, ln_b, mean, rstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return nothing(ctx)
        needs = ctx.needs_input_grad
        dx_and_params = backward_of(
            _LayerNormLinear.op, _linear_backward, grads[0], *ctx.saved_tensors, wanted(needs)
        )
        return tuple(only_wanted(dx_and_params, needs))


class _LinearResidual(Fused):
    op = "linear_residual"

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        return _linear(x, None, None, weight, bias, residual)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        if dy is None:
            return nothing(ctx)
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad
        needs = need_x, False, False, need_weight, need_bias
        none = x.new_empty(0, dtype=torch.float32)  # mean and rstd of the absent norm
        dx, _, _, dweight, dbias = only_wanted(
            backward_of(
                _LinearResidual.op, _linear_backward,
                dy, x, None, None, none, none, weight, bias, wanted(needs),
            ),
            needs,
        )  # fmt: skip
        return dx, dweight, dbias, dy if need_residual else None


_NORM_TABLE = Table(
    "layer_norm_linear",
    x=activation("... K"),
    **affine("ln_w", "ln_b", "K"),
    **affine("weight", "bias", "N K"),
)
_RESIDUAL_TABLE = Table(
    "linear_residual",
    x=activation("... K"),
    **affine("weight", "bias", "N K"),
    residual=activation("... N"),
)


@public
def layer_norm_linear(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Computes LayerNorm(x) weight' + bias; eps 1e-5, statistics in float32, variance two-pass.

    Args:
        x: (..., K), float32, bfloat16 or, on a GPU, float16.
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
    params = (ln_w, ln_b, weight, bias)
    _NORM_TABLE.check(x, *params)
    select.require_fused("layer_norm_linear", x.device.type, x.dtype)
    if not needs_grad(x, *params):
        return _linear(x, *params, None)[0]
    return _LayerNormLinear.call(x, *params)[0]


@public
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Computes residual + x weight' + bias.

    Args:
        x: (..., K), float32, bfloat16 or, on a GPU, float16.
        weight: (N, K), contiguous, float32 or x's dtype.
        bias: (N,) or None.
        residual: (..., N), like x.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        BackendError: There are no fused kernels for the device or dtype.
    """
    _RESIDUAL_TABLE.check(x, weight, bias, residual)
    select.require_fused("linear_residual", x.device.type, x.dtype)
    if not needs_grad(x, weight, bias, residual):
        return _linear(x, None, None, weight, bias, residual)[0]
    return _LinearResidual.call(x, weight, bias, residual)
