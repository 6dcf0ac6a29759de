"""The output projection and its cross-entropy in one pass, without the (B T, V) logits as a whole.

Letters: M rows (all leading dimensions), K columns, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptfast.ops.common import check_activation, check_indices, check_param, define


def _fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad: bool
) -> tuple[Tensor, ...]:
    dx, dweight = (t.new_empty(t.shape if with_grad else (0,)) for t in (x, weight))
    return x.new_empty((), dtype=torch.float32), dx, dweight


_linear_cross_entropy = define(
    """
    linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool with_grad)
        -> (Tensor loss, Tensor dx, Tensor dweight)
    """,
    _fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, with_grad: bool, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        loss, dx, dweight = _linear_cross_entropy(x, weight, targets, ignore_index, with_grad)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dloss,) = grads
        dx, dweight = ctx.saved_tensors
        return None, dx * dloss, dweight * dloss, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Computes the mean of -log softmax(x weight')[target], `ignore_index` left out.

    The gradients of x and weight are made in the same pass. The mean over no target at all is 0.

    Args:
        x: (..., K), float32 or bfloat16.
        weight: (V, K), float32 or x's dtype.
        targets: (...), int64 in [0, V) or `ignore_index`.
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
    check_param(op, "weight", weight, x, (weight.shape[0], x.shape[-1]))
    check_indices(op, "targets", targets, tuple(x.shape[:-1]))
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(with_grad, x, weight, targets, ignore_index)
