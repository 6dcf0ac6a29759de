"""The feed-forward sublayer as two fused linear layers, and its backward.

Letters: C n_embd, F hidden columns, M rows (all leading dimensions).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import absent, dropout_args, precision, tuned, wants
from gptfast.ops.triton.linear import (
    PRODUCT,
    multiply,
    product_kind,
    product_shared,
    weight_grads,
)
from gptfast.ops.triton.rows import dropped, moments, norm_backward
from gptfast.ops.triton.tiles import gelu, gelu_slope, own_tile, product

# Without PRODUCT's largest tiles: together with a tile of U they would spill registers.
HIDDEN_GRAD = {2: PRODUCT[2][1:], 4: PRODUCT[4]}


@tuned(HIDDEN_GRAD, product_kind, product_shared, ["N", "K", "PRECISION"])
@triton.jit(do_not_specialize=["M"])
def hidden_grad_kernel(
    a, b, before, dhidden, hidden, M, N, K, GELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of dU = (A B) gelu'(U), and of gelu(U), which is recomputed; `before` holds U.

    A (M, K) is the gradient of the second layer's output, B (K, N) that layer's weight.
    """
    m, n, _, _ = own_tile(M, N, BM, BN, GROUP)
    acc = product(a, b, None, None, None, None, m, n, M, N, K, N, 1, PRECISION, BM, BN, BK)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    u = tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dhidden + at, (acc * gelu_slope(u, GELU)).to(dhidden.dtype.element_ty), mask=inside)
    tl.store(hidden + at, gelu(u, GELU).to(hidden.dtype.element_ty), mask=inside)


def ffn(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, gelu: str, dropout_p: float, seed: Tensor | None, stream: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """gptfast::ffn."""
    x = x.contiguous()
    mean, rstd = moments(x)
    rows = x.numel() // x.shape[-1] if keep else 0
    before = x.new_empty(rows, w1.shape[0])
    hidden = multiply(
        x, w1.t(), norm=(mean, rstd, ln_w, ln_b), bias=b1, gelu=gelu,
        before=before if keep else None,
    )  # fmt: skip
    dropout = dropout_args(dropout_p, seed, stream, x.device)
    y = multiply(hidden, w2.t(), bias=b2, dropout=dropout, residual=x)
    return y, mean[:rows], rstd[:rows], before


def ffn_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, mean: Tensor, rstd: Tensor, before: Tensor,
    gelu: str, dropout_p: float, seed: Tensor | None, stream: int, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::ffn_backward."""
    x, dy = x.contiguous(), dy.contiguous()
    d = dropped(dy, dropout_args(dropout_p, seed, stream, x.device))
    dhidden, hidden = torch.empty_like(before), torch.empty_like(before)
    (M, N), K = before.shape, d.shape[-1]
    if before.numel():
        grid = lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)  # noqa: E731
        hidden_grad_kernel[grid](
            d, w2.to(x.dtype), before, dhidden, hidden, M, N, K, GELU=gelu, PRECISION=precision()
        )
    norm = mean, rstd, ln_w, ln_b
    params = (
        *weight_grads(dhidden, x, w1, b1, norm, wanted=wanted >> 3),
        *weight_grads(d, hidden, w2, b2, wanted=wanted >> 5),
    )
    if not wants(wanted, 0, 2):
        return x.new_empty(0), absent(x), absent(x), *params
    dn = multiply(dhidden, w1).view_as(x)
    return *norm_backward(dn, x, dy, *norm, wanted=wanted), *params
