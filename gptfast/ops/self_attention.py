"""The attention block of a pre-norm transformer as one operator, residual included.

Letters: B batch, T time, C n_embd, H heads, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.arguments import Table, activation, affine, check_dropout, check_int
from gptfast.ops.autograd import needs_grad
from gptfast.ops.flops import of_attention, of_product, of_product_backward
from gptfast.ops.library import define, public
from gptfast.ops.random import seed_tensor
from gptfast.ops.sublayer import fake_backward, sublayer


def _fake_self_attention(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    n_head, *_, keep = args[6:]
    B, T, C = x.shape
    kept = B if keep else 0
    moments = [x.new_empty(kept * T, dtype=torch.float32) for _ in range(2)]
    qkv, out = x.new_empty(kept, T, 3 * C), x.new_empty(kept, T, C)
    return x.new_empty(B, T, C), *moments, qkv, out, moments[0].new_empty(kept, n_head, 2, T)


def _flops(x: Any, ln_w: Any, ln_b: Any, w_qkv: Any, *args: Any) -> int:
    _, w_proj, _, n_head, *_ = args
    return of_product(x, w_qkv) + of_attention(*_heads(x, n_head)) + of_product(x, w_proj)


def _backward_flops(dy: Any, x: Any, *args: Any) -> int:
    _, _, w_qkv, _, w_proj, _, _, _, _, _, _, n_head, *_, wanted = args
    through = wanted & 0b11111  # the gradient of attention's output is needed
    return (
        of_product_backward(x, w_qkv, wanted & 0b111, wanted & 0b1000)
        + (2 * of_attention(*_heads(x, n_head)) if through else 0)
        + of_product_backward(x, w_proj, through, wanted & 0b100000)
    )


def _heads(x: tuple[int, ...], n_head: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    B, T, C = x
    return ((B, n_head, T, C // n_head),) * 2


_self_attention = define(
    """
    self_attention(Tensor x, Tensor ln_w, Tensor? ln_b, Tensor w_qkv, Tensor? b_qkv,
        Tensor w_proj, Tensor? b_proj, int n_head, float proj_dropout_p, int proj_stream,
        float dropout_p, Tensor? seed, int stream, bool keep)
        -> (Tensor y, Tensor mean, Tensor rstd, Tensor qkv, Tensor out, Tensor lse)
    """,
    _fake_self_attention,
    _flops,
)
_self_attention_backward = define(
    """
    self_attention_backward(Tensor dy, Tensor x, Tensor ln_w, Tensor? ln_b,
        Tensor w_qkv, Tensor? b_qkv, Tensor w_proj, Tensor? b_proj, Tensor mean, Tensor rstd,
        Tensor qkv, Tensor out, Tensor lse, int n_head, float proj_dropout_p, int proj_stream,
        float dropout_p, Tensor? seed, int stream, int wanted)
        -> (Tensor dx, Tensor dln_w, Tensor dln_b, Tensor dw_qkv, Tensor db_qkv,
            Tensor dw_proj, Tensor db_proj)
    """,
    fake_backward,
    _backward_flops,
)


_SelfAttention = sublayer("layer_norm_attention", _self_attention, _self_attention_backward)
_TABLE = Table(
    "layer_norm_attention",
    x=activation("B T C"),
    **affine("ln_w", "ln_b", "C"),
    **affine("w_qkv", "b_qkv", "3C C"),
    **affine("w_proj", "b_proj", "C C"),
)


@public
def layer_norm_attention(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor | None,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    n_head: int,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    proj_dropout_p: float = 0.0,
    proj_stream: int = 0,
) -> Tensor:
    """Computes x + dropout(attention(LayerNorm(x) w_qkv' + b_qkv) w_proj' + b_proj), as in GPT-2.

    The packed projection's columns are q, then k, then v, each (H, D); attention is
    `causal_attention`.

    Args:
        x: (B, T, C), float32, bfloat16 or, on a GPU, float16.
        ln_w: (C,), float32 or x's dtype, as are all parameters; gradients have the parameter's
            dtype.
        ln_b: (C,) or None.
        w_qkv: (3 C, C), contiguous, as nn.MultiheadAttention keeps it.
        b_qkv: (3 C,) or None.
        w_proj: (C, C), contiguous.
        b_proj: (C,) or None.
        n_head: H; C must be divisible by it.
        dropout_p: Probability, in [0, 1], of an attention weight to be dropped.
        seed: Key of the dropout masks, () int64 or an int; drawn from torch's default generator
            when None.
        stream: Number of this dropout among those that share the seed.
        proj_dropout_p: Probability, in [0, 1], of an output of the projection to be dropped.
        proj_stream: Number of the projection's dropout, which must differ from `stream`.

    Returns:
        (B, T, C) in x's dtype.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        BackendError: There are no fused kernels for the device or dtype.
    """
    op = "layer_norm_attention"
    params = (ln_w, ln_b, w_qkv, b_qkv, w_proj, b_proj)
    C = _TABLE.check(x, *params)["C"]
    n_head = check_int(op, "n_head", n_head)
    if n_head < 1 or C == 0 or C % n_head:
        raise ValueError(
            f"{op}: x must have columns that n_head={n_head} divides, got shape {tuple(x.shape)}"
        )
    select.require_fused(op, x.device.type, x.dtype, head_dim=C // n_head)
    dropout_p = check_dropout(op, dropout_p)
    proj_dropout_p = check_dropout(op, proj_dropout_p, "proj_dropout_p")
    stream = check_int(op, "stream", stream)
    proj_stream = check_int(op, "proj_stream", proj_stream)
    key = seed_tensor(seed) if dropout_p > 0.0 or proj_dropout_p > 0.0 else None
    options = n_head, proj_dropout_p, proj_stream, dropout_p, key, stream
    if not needs_grad(x, *params):
        return _self_attention(x, *params, *options, False)[0]
    return _SelfAttention.call(x, *params, *options)[0]
