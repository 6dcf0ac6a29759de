"""Autograd shared by the sublayers, attention and FFN: x + f(LN(x)) of seven tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gptfast.ops.autograd import Fused, backward_of, nothing, only_wanted, wanted
from gptfast.ops.linear import fake_grads


def fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Returns fake gradients of a sublayer, for shape inference."""
    return fake_grads(x, args[:6], args[-1])


def sublayer(
    name: str, operator: Callable[..., Any], operator_backward: Callable[..., Any]
) -> type[Fused]:
    """Makes the autograd function that joins a sublayer's operator and its backward.

    Its inputs are x, weight and bias of the norm and of two linear layers, the options of the
    sublayer, dropout_p, seed and stream. The operator has a further argument `keep`: whether it
    also returns the tensors that its backward reads.
    """

    class Sublayer(Fused):
        op = name

        @staticmethod
        def forward(x: Tensor, *args: Any) -> Any:
            return operator(x, *args, True)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors, (*options, seed, stream) = inputs[:7], inputs[7:]
            _, *kept = output
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *kept, seed)
            ctx.options, ctx.stream = options, stream

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if grads[0] is None:
                return nothing(ctx)
            *kept, seed = ctx.saved_tensors
            needs = ctx.needs_input_grad[:7]
            found = backward_of(
                name, operator_backward,
                grads[0], *kept, *ctx.options, seed, ctx.stream, wanted(needs),
            )  # fmt: skip
            others = [None] * (len(ctx.needs_input_grad) - len(needs))
            return *only_wanted(found, needs), *others

    return Sublayer
