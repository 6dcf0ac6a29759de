"""Causal attention with dropout inside, forward and backward.

Letters: B batch, T time (Tq queries, Tk keys), H heads, D head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.arguments import Table, activation, check_dropout, check_int
from gptfast.ops.autograd import Fused, backward_of, constant, needs_grad, nothing
from gptfast.ops.flops import of_attention
from gptfast.ops.library import define, public
from gptfast.ops.random import seed_tensor


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    B, H, Tq, D = q.shape
    return q.new_empty(B, Tq, H, D), q.new_empty(B, H, 2, Tq, dtype=torch.float32)


def _fake_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (q, k, v))


_attention = define(
    """
    attention(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, int stream)
        -> (Tensor out, Tensor lse)
    """,
    _fake_attention,
    lambda q, k, *_: of_attention(q, k),
)
_attention_backward = define(
    """
    attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
        float scale, float dropout_p, Tensor? seed, int stream)
        -> (Tensor dq, Tensor dk, Tensor dv)
    """,
    _fake_attention_backward,
    lambda dout, q, k, *_: 2 * of_attention(q, k),
)


class _Attention(Fused):
    op = "causal_attention"

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, *options: Any) -> Any:
        scale, dropout_p, stream = options
        return _attention(q, k, v, scale, dropout_p, seed, stream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, seed, *options = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return nothing(ctx)
        *kept, seed = ctx.saved_tensors
        scale, dropout_p, stream = ctx.options
        found = backward_of(
            _Attention.op, _attention_backward, grads[0], *kept, scale, dropout_p, seed, stream
        )
        return *found, None, None, None, None


_TABLE = Table(
    "causal_attention",
    q=activation("B H Tq D"),
    k=activation("B H Tk D"),
    v=activation("B H Tk D"),
)


@public
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Computes dropout(softmax(scale q k' + causal mask)) v without the (Tq, Tk) matrix in memory.

    The mask is aligned bottom-right: query i sees the keys up to i + Tk - Tq; a query that sees no
    key gives 0. Online softmax in blocks (FlashAttention-2, arXiv:2307.08691), statistics and sums
    in float32.

    Args:
        q: (B, H, Tq, D), float32, bfloat16 or, on a GPU, float16, any strides (a tensor whose
            last stride is not 1 is copied).
        k: (B, H, Tk, D), like q.
        v: (B, H, Tk, D), like q.
        dropout_p: Probability, in [0, 1], of an attention weight to be dropped.
        seed: Key of the dropout mask, () int64 or an int; drawn from torch's default generator when
            None.
        stream: Number of this dropout among those that share the seed.
        scale: Factor of the scores; 1 / sqrt(D) when None.

    Returns:
        (B, H, Tq, D) in q's dtype, a transposed view of (B, Tq, H, D).

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        BackendError: There are no fused kernels for the device or dtype.
    """
    D = _TABLE.check(q, k, v)["D"]
    if D == 0:
        raise ValueError(
            f"causal_attention: q must have at least 1 column per head, got shape {tuple(q.shape)}"
        )
    select.require_fused("causal_attention", q.device.type, q.dtype, head_dim=D)
    dropout_p = check_dropout("causal_attention", dropout_p)
    scale = 1 / math.sqrt(D) if scale is None else constant("causal_attention", "scale", scale)
    stream = check_int("causal_attention", "stream", stream)
    if scale < 0.0:
        q, scale = -q, -scale  # the kernels need the largest score to be the likeliest
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    key = seed_tensor(seed) if dropout_p > 0.0 else None
    if needs_grad(q, k, v):
        out, _ = _Attention.call(q, k, v, key, scale, dropout_p, stream)
    else:
        out, _ = _attention(q, k, v, scale, dropout_p, key, stream)
    return out.transpose(1, 2)
