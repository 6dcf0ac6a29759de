"""What attention and FFN, the two halves of a block, share: seven tensors in, x + f(LN(x)) out."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gptfast.ops.autograd import Fused, backward_of, only_wanted, wanted
from gptfast.ops.linear import fake_grads


def fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The shapes of a sublayer's gradients."""
    return fake_grads(x, args[:6], args[-1])


def sublayer(
    name: str, operator: Callable[..., Any], operator_backward: Callable[..., Any]
) -> type[Fused]:
    """The function that joins a sublayer's operator and its backward.

    Its inputs are x, the norm's two parameters, those of two linear layers, then an option of the
    sublayer's own, dropout_p, seed and stream. The operator takes `keep` after them, whether it
    also returns what its backward reads.
    """

    class Sublayer(Fused):
        op = name

        @staticmethod
        def forward(x: Tensor, *args: Any) -> Any:
            return operator(x, *args, True)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *tensors, option, dropout_p, seed, stream = inputs
            _, *kept = output
            ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *kept, seed)
            ctx.options = option, dropout_p, stream

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            *kept, seed = ctx.saved_tensors
            option, dropout_p, stream = ctx.options
            needs = ctx.needs_input_grad[:7]
            found = backward_of(
                name, operator_backward,
                grads[0], *kept, option, dropout_p, seed, stream, wanted(needs),
            )  # fmt: skip
            return *only_wanted(found, needs), None, None, None, None

    return Sublayer
