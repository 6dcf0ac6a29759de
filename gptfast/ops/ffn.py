"""The feed-forward block of a pre-norm transformer as one operator, residual included.

Letters: C n_embd, F hidden columns (4 C in GPT-2), M rows (all leading dimensions).
"""

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.arguments import (
    Table,
    activation,
    affine,
    check_choice,
    check_dropout,
    check_int,
)
from gptfast.ops.autograd import needs_grad
from gptfast.ops.flops import of_product, of_product_backward
from gptfast.ops.library import define, public
from gptfast.ops.random import seed_tensor
from gptfast.ops.sublayer import fake_backward, sublayer


def _fake_ffn(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w1: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *_, keep = args
    rows = math.prod(x.shape[:-1]) if keep else 0
    moments = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape), *moments, x.new_empty(rows, w1.shape[0])


def _ffn_backward_flops(dy: Any, x: Any, *args: Any) -> int:
    _, _, w1, b1, w2, *_, wanted = args
    hidden = (*x[:-1], w1[0])
    through = wanted & 0b11111  # the gradient of the hidden activations is needed
    return of_product_backward(hidden, w2, through, wanted & 0b100000) + of_product_backward(
        x, w1, wanted & 0b111, wanted & 0b1000
    )


_ffn = define(
    """
    ffn(Tensor x, Tensor ln_w, Tensor? ln_b, Tensor w1, Tensor? b1, Tensor w2,
        Tensor? b2, str gelu, float dropout_p, Tensor? seed, int stream, bool keep)
        -> (Tensor y, Tensor mean, Tensor rstd, Tensor hidden)
    """,
    _fake_ffn,
    lambda x, ln_w, ln_b, w1, *_: 2 * of_product(x, w1),
)
_ffn_backward = define(
    """
    ffn_backward(Tensor dy, Tensor x, Tensor ln_w, Tensor? ln_b, Tensor w1, Tensor? b1,
        Tensor w2, Tensor? b2, Tensor mean, Tensor rstd, Tensor hidden, str gelu, float dropout_p,
        Tensor? seed, int stream, int wanted)
        -> (Tensor dx, Tensor dln_w, Tensor dln_b, Tensor dw1, Tensor db1, Tensor dw2,
            Tensor db2)
    """,
    fake_backward,
    _ffn_backward_flops,
)


_Ffn = sublayer("layer_norm_ffn", _ffn, _ffn_backward)
_TABLE = Table(
    "layer_norm_ffn",
    x=activation("... C"),
    **affine("ln_w", "ln_b", "C"),
    **affine("w1", "b1", "F C"),
    **affine("w2", "b2", "C F"),
)


@public
def layer_norm_ffn(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    gelu: str = "erf",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Computes x + dropout(GELU(LayerNorm(x) w1' + b1) w2' + b2), hidden activations kept in cache.

    Args:
        x: (..., C), float32, bfloat16 or, on a GPU, float16.
        ln_w: (C,), float32 or x's dtype, as are all parameters; gradients have the parameter's
            dtype.
        ln_b: (C,) or None.
        w1: (F, C), contiguous, as nn.Linear keeps it.
        b1: (F,) or None.
        w2: (C, F), contiguous.
        b2: (C,) or None.
        gelu: "erf" or "tanh" (Hendrycks and Gimpel, arXiv:1606.08415).
        dropout_p: Probability, in [0, 1], of an output of the second layer to be dropped.
        seed: Key of the dropout mask, () int64 or an int; drawn from torch's default generator when
            None.
        stream: Number of this dropout among those that share the seed.

    Returns:
        (..., C) in x's dtype.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        BackendError: There are no fused kernels for the device or dtype.
    """
    op = "layer_norm_ffn"
    params = (ln_w, ln_b, w1, b1, w2, b2)
    _TABLE.check(x, *params)
    select.require_fused(op, x.device.type, x.dtype)
    check_choice(op, "gelu", gelu, ("erf", "tanh"))
    dropout_p = check_dropout(op, dropout_p)
    stream = check_int(op, "stream", stream)
    key = seed_tensor(seed) if dropout_p > 0.0 else None
    if not needs_grad(x, *params):
        return _ffn(x, *params, gelu, dropout_p, key, stream, False)[0]
    return _Ffn.call(x, *params, gelu, dropout_p, key, stream)[0]
