"""Final norm, output projection and cross-entropy, without the (B T, V) logits as a whole.

Letters: M rows (all leading dimensions), K columns, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from gptfast.ops.common import (
    check_activation,
    check_indices,
    check_param,
    check_tensor,
    define,
    needs_grad,
    once_differentiable,
)
from gptfast.ops.linear import absent_to_none, fake_grad


def _fake(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    params = (norm_weight, norm_bias, weight)
    grads = (fake_grad(param if with_grad else None, x) for param in params)
    dx = x.new_empty(x.shape if with_grad else (0,))
    return x.new_empty((), dtype=torch.float32), dx, *grads


_linear_cross_entropy = define(
    """
    linear_cross_entropy(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight,
        Tensor targets, int ignore_index, bool with_grad)
        -> (Tensor loss, Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight)
    """,
    _fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, with_grad: bool, *inputs: Any) -> Tensor:
        loss, *grads = _linear_cross_entropy(*inputs, with_grad)
        x, norm_weight, norm_bias, weight, _, _ = inputs
        ctx.save_for_backward(*absent_to_none(tuple(grads), (x, norm_weight, norm_bias, weight)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dloss,) = grads
        saved = ctx.saved_tensors
        # A loss that is differentiated as it is needs no pass over the weight's gradient. What a
        # compiled graph does cannot depend on the value, and a GPU is not waited for.
        if torch.compiler.is_compiling() or not dloss.is_cpu or dloss.item() != 1.0:
            saved = tuple(None if grad is None else grad * dloss for grad in saved)
        return None, *saved, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ln_w: Tensor | None = None,
    ln_b: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Computes the mean of -log softmax(LayerNorm(x) weight')[target], `ignore_index` left out.

    The gradients are made in the same call, from logits that exist by blocks of rows: at most
    160 MB of them at a time, or 768 rows where those are more. The mean over
    no target at all is 0.

    Args:
        x: (..., K), float32 or bfloat16.
        weight: (V, K), contiguous, float32 or x's dtype.
        targets: (...), int64 in [0, V) or `ignore_index`.
        ln_w: (K,), float32 or x's dtype, as `layer_norm_linear` has it; None: no norm.
        ln_b: (K,) or None.
        ignore_index: Targets of this value count for nothing.

    Returns:
        () float32.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        RuntimeError: A target is out of range.
        BackendError: There are no fused kernels for the device or dtype.
    """
    op = "linear_cross_entropy"
    check_activation(op, "x", x)
    check_tensor(op, "weight", weight, 2)
    K = x.shape[-1]
    check_param(op, "weight", weight, x, (weight.shape[0], K))
    check_param(op, "ln_w", ln_w, x, (K,))
    check_param(op, "ln_b", ln_b, x, (K,))
    check_indices(op, "targets", targets, x, tuple(x.shape[:-1]))
    if ln_w is None and ln_b is not None:
        raise ValueError(f"{op}: ln_b needs ln_w, got ln_b alone")
    params = (ln_w, ln_b, weight)
    with_grad = needs_grad(x, *params)
    return _LinearCrossEntropy.apply(with_grad, x, *params, targets, ignore_index)
