"""Final norm, output projection and cross-entropy, without the (B T, V) logits as a whole.

Letters: M rows (all leading dimensions), K columns, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.arguments import (
    Argument,
    Kind,
    Table,
    activation,
    check_choice,
    check_int,
    check_smoothing,
    parameter,
)
from gptfast.ops.autograd import (
    Fused,
    backward_of,
    needs_grad,
    nothing,
    only_wanted,
    refuse,
    transformed,
    wanted,
)
from gptfast.ops.flops import of_product, of_product_backward
from gptfast.ops.library import define, public
from gptfast.ops.linear import fake_grads

REDUCTIONS = ("mean", "sum", "none")


def _fake(
    x: Tensor,
    ln_w: Tensor | None,
    ln_b: Tensor | None,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, *fake_grads(x, (ln_w, ln_b, weight), wanted)


def _flops(x: Any, ln_w: Any, ln_b: Any, weight: Any, *args: Any) -> int:
    *_, wanted = args
    grads = of_product_backward(x, weight, wanted & 0b111, wanted & 0b1000)
    return of_product(x, weight) + grads


# The gradients are those of the reduced loss; with "none" they are those of the sum.
_linear_cross_entropy = define(
    """
    linear_cross_entropy(Tensor x, Tensor? ln_w, Tensor? ln_b, Tensor weight,
        Tensor targets, Tensor? token_weights, int ignore_index, str reduction,
        float label_smoothing, int wanted)
        -> (Tensor loss, Tensor dx, Tensor dln_w, Tensor dln_b, Tensor dweight)
    """,
    _fake,
    _flops,
)


class _ReducedLoss(Fused):
    """A mean or a sum, computed together with its gradients, which are outputs as well.

    A second derivative therefore differentiates an output of this function and raises.
    """

    op = "linear_cross_entropy"

    @staticmethod
    def forward(*args: Any) -> Any:
        return _linear_cross_entropy(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *grads = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        dloss, *second = incoming
        needs = ctx.needs_input_grad
        _refuse_token_weights(needs[5])
        # A compiled graph is differentiated once, with zeros for outputs that nothing reads.
        if not torch.compiler.is_compiling() and any(each is not None for each in second):
            refuse(_ReducedLoss.op)
        if dloss is None:
            return nothing(ctx)
        grads = only_wanted(ctx.saved_tensors, needs[:4])
        return *(_scaled(grads, dloss)), *(None,) * (len(needs) - 4)


_ONES: dict[torch.device, Tensor] = {}


def one(device: torch.device) -> Tensor:
    """Returns a gradient of 1 for `backward`, () float32, which the loss knows without reading it.

    There is one per device, which the caller must not change.
    """
    if device not in _ONES:
        _ONES[device] = torch.ones((), device=device)
    return _ONES[device]


def _scaled(grads: list[Tensor | None], dloss: Tensor) -> list[Tensor | None]:
    """Multiplies the gradients that were made with a loss by `dloss`, the loss's own gradient.

    If the loss is differentiated once, this happens in place. A `dloss` of 1 needs no pass over the
    gradients; on a GPU only `one` is recognised, because reading the value would synchronise. A
    compiled graph or a transform cannot branch on the value.
    """
    plain = not (torch.compiler.is_compiling() or transformed() or torch.is_grad_enabled())
    # With is_grads_batched there are several values.
    plain = plain and not torch._C._functorch.is_legacy_batchedtensor(dloss)
    once = plain and not torch._C._autograd._get_current_graph_task_keep_graph()
    if not once:
        return [None if grad is None else grad * dloss for grad in grads]
    grads = [None if grad is None else grad.detach() for grad in grads]
    if not (dloss is _ONES.get(dloss.device) or dloss.is_cpu and dloss.item() == 1.0):
        for grad in grads:
            if grad is not None:
                grad.mul_(dloss)
    return grads


class _TokenLosses(Fused):
    """A loss per token. The backward makes the gradients: those of a weighted sum."""

    op = "linear_cross_entropy"

    @staticmethod
    def forward(*args: Any) -> Any:
        *inputs, label_smoothing = args
        return _linear_cross_entropy(*inputs, "none", label_smoothing, 0)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.ignore_index, ctx.label_smoothing = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dlosses,) = grads
        if dlosses is None:
            return nothing(ctx)
        *inputs, token_weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        _refuse_token_weights(needs[5])
        weights = dlosses if token_weights is None else dlosses * token_weights
        _, *found = backward_of(
            _TokenLosses.op, _linear_cross_entropy,
            *inputs, weights, ctx.ignore_index, "sum", ctx.label_smoothing, wanted(needs[:4]),
        )  # fmt: skip
        return *only_wanted(tuple(found), needs[:4]), *(None,) * (len(needs) - 4)


def _refuse_token_weights(needed: bool) -> None:
    if needed:
        raise TypeError(
            "linear_cross_entropy: token_weights must be constants, got a tensor that requires a"
            " gradient; multiply the losses of reduction='none' by it"
        )


_TABLE = Table(
    "linear_cross_entropy",
    x=activation("... K"),
    weight=parameter("V K"),
    ln_w=parameter("K", optional=True),
    ln_b=parameter("K", optional=True),
    targets=Argument(Kind.INDICES, "..."),
    token_weights=Argument(Kind.FLOATING, "...", optional=True),
)


@public
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ln_w: Tensor | None = None,
    ln_b: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes -log softmax(LayerNorm(x) weight')[target] of all tokens, `ignore_index` left out.

    With label smoothing e it is (1 - e) times that, plus e times the mean of -log softmax.

    For a mean or a sum, the same call makes the gradients; for reduction "none" the backward makes
    them and computes the logits again. Only a block of rows of logits exists at a time: on a CPU at
    most 160 MiB, but at least 192 to 768 rows, by dtype and processor; on a GPU 200 MiB, but at
    least 128 rows.

    Args:
        x: (..., K), float32, bfloat16 or, on a GPU, float16.
        weight: (V, K), contiguous, float32 or x's dtype.
        targets: (...), int64 in [0, V) or `ignore_index`.
        ln_w: (K,), float32 or x's dtype, as `layer_norm_linear` has it; None: no norm.
        ln_b: (K,) or None.
        ignore_index: Targets of this value count for nothing.
        reduction: "mean" divides the sum of the losses by the sum of their weights, and is 0 where
            that sum is 0; "sum"; or "none", the loss of each token, 0 where it is ignored.
        token_weights: (...), floating-point, a factor of each token's loss; None: 1. A constant:
            it gets no gradient.
        label_smoothing: The part e of the target's probability that all V tokens share, in [0, 1).

    Returns:
        () float32; of reduction "none" (...) float32.

    Raises:
        ValueError, TypeError: Shapes, dtypes or numbers do not fit, or token_weights requires a
            gradient.
        RuntimeError: A target is out of range.
        BackendError: There are no fused kernels for the device or dtype.
    """
    op = "linear_cross_entropy"
    _TABLE.check(x, weight, ln_w, ln_b, targets, token_weights)
    select.require_fused(op, x.device.type, x.dtype)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    label_smoothing = check_smoothing(op, label_smoothing)
    ignore_index = check_int(op, "ignore_index", ignore_index)
    if ln_w is None and ln_b is not None:
        raise ValueError(f"{op}: ln_b needs ln_w, got ln_b alone")
    if token_weights is not None:
        if torch.is_grad_enabled() and not transformed():
            _refuse_token_weights(token_weights.requires_grad)
        token_weights = token_weights.float()
    inputs = (x, ln_w, ln_b, weight, targets, token_weights, ignore_index)
    if not needs_grad(x, ln_w, ln_b, weight):
        return _linear_cross_entropy(*inputs, reduction, label_smoothing, 0)[0]
    if reduction == "none":
        return _TokenLosses.call(*inputs, label_smoothing)
    # Within a transform no tensor tells what is wanted around it.
    grads = tuple(
        t is not None and (t.requires_grad or transformed()) for t in (x, ln_w, ln_b, weight)
    )
    return _ReducedLoss.call(*inputs, reduction, label_smoothing, wanted(grads))[0]
