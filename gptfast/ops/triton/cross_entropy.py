"""Final norm, output projection and cross-entropy in blocks of the vocabulary.

The (M, V) logits are never stored: the loss needs only each row's maximum and sum of exponentials
per tile. For the gradients, a block of logits is recomputed and turned into its gradient, which is
multiplied by the weight and by the activations.

Letters: M rows (all leading dimensions), K columns, V vocab_size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import absent, config, precision, tuned, wants
from gptfast.ops.triton.linear import (
    NO_NORM,
    Norm,
    multiply,
    product_kind,
    product_shared,
    weight_grads,
)
from gptfast.ops.triton.rows import moments, norm_backward
from gptfast.ops.triton.tiles import LN2, LOG2E, own_tile, product

BLOCK_BYTES = 1 << 26  # bytes of a block of the logits' gradient
MIN_BLOCK = 1024  # minimum number of columns of such a block
PART = 128  # columns per partial maximum and sum of a row

PRODUCT = {
    2: [config(8, 3, BM=128, BK=32, GROUP=8), config(4, 2, BM=64, BK=32, GROUP=8)],
    4: [config(8, 2, BM=64, BK=32, GROUP=8)],
}


@tuned(PRODUCT, product_kind, product_shared, ["V", "K", "PRECISION"])
@triton.jit
def partial_sums_kernel(
    a, b, targets, tops, totals, target_logits, mean, rstd, ln_w, ln_b, M, V, K,
    PRECISION: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """For each row of a tile of logits: max_j s_j, sum_j exp(s_j - max), and the target's logit."""
    m, n, _, n0 = own_tile(M, V, BM, BN, GROUP)
    s = product(a, b, mean, rstd, ln_w, ln_b, m, n, M, V, K, 1, K, PRECISION, BM, BN, BK)
    s = tl.where((n < V)[None, :], s, -float("inf"))
    top = tl.max(s, 1)
    at = (n0 // BN).to(tl.int64) * M + m
    tl.store(tops + at, top, mask=m < M)
    tl.store(totals + at, tl.sum(tl.exp2((s - top[:, None]) * LOG2E), 1), mask=m < M)
    target = tl.load(targets + m, mask=m < M, other=-1)
    own = n[None, :] == target[:, None]
    here = (target >= n0) & (target < n0 + BN)
    tl.store(target_logits + m, tl.sum(tl.where(own, s, 0.0), 1), mask=(m < M) & here)


@triton.jit
def losses_kernel(
    tops, totals, target_logits, targets, sums, losses, ignore_index, M, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the parts in order to max_j s_j and sum_j exp(s_j - max); losses, 0 if ignored.

    Maximum and sum are stored separately: max + ln sum would be rounded to the precision of max.
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = m < M
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, parts):
        at = tl.cast(part, tl.int64) * M + m
        other = tl.load(tops + at, mask=inside, other=0.0)
        both = tl.maximum(top, other)
        total *= tl.exp2((top - both) * LOG2E)
        total += tl.load(totals + at, mask=inside, other=1.0) * tl.exp2((other - both) * LOG2E)
        top = both
    counted = inside & (tl.load(targets + m, mask=inside, other=0) != ignore_index)
    target = tl.load(target_logits + m, mask=counted, other=0.0)
    tl.store(sums + m, top, mask=inside)
    tl.store(sums + M + m, total, mask=inside)
    loss = (top - target) + tl.log2(total) * LN2
    tl.store(losses + m, tl.where(counted, loss, 0.0), mask=inside)


@tuned(PRODUCT, product_kind, product_shared, ["V", "K", "PRECISION"])
@triton.jit(do_not_specialize=["v0"])
def logits_grad_kernel(
    a, b, targets, sums, shares, dlogits, mean, rstd, ln_w, ln_b,
    M, V, K, v0, PRECISION: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dS_j = (exp(s_j - max) / sum - [j = target]) share for V columns from v0; 0 if share is 0."""
    m, n, _, _ = own_tile(M, V, BM, BN, GROUP)
    s = product(a, b, mean, rstd, ln_w, ln_b, m, n, M, V, K, 1, K, PRECISION, BM, BN, BK)
    target = tl.load(targets + m, mask=m < M, other=0)
    value = tl.exp2((s - tl.load(sums + m, mask=m < M, other=0.0)[:, None]) * LOG2E)
    value *= 1.0 / tl.load(sums + M + m, mask=m < M, other=1.0)[:, None]
    value -= tl.where((n + v0)[None, :] == target[:, None], 1.0, 0.0)
    share = tl.load(shares + m, mask=m < M, other=0.0)[:, None]
    value = tl.where(share == 0.0, 0.0, value * share)
    at = dlogits + m.to(tl.int64)[:, None] * V + n[None, :]
    tl.store(at, value.to(dlogits.dtype.element_ty), mask=(m < M)[:, None] & (n < V)[None, :])


def linear_cross_entropy(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    targets: Tensor, token_weights: Tensor | None, ignore_index: int, reduction: str, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_cross_entropy."""
    x, targets, (V, K) = x.contiguous(), targets.contiguous(), weight.shape
    counted = targets != ignore_index
    torch._assert_async(
        (~counted | ((targets >= 0) & (targets < V))).all(),
        f"linear_cross_entropy: targets must be in [0, {V}) or {ignore_index}",
    )
    own = weight.to(x.dtype)
    norm = None if ln_w is None else (*moments(x), ln_w, ln_b)
    sums, losses = _losses(x, own, targets, ignore_index, norm)
    shares = counted.float()
    if token_weights is not None:
        shares = torch.where(counted, token_weights, 0.0)
        losses = losses * shares.flatten()
    if reduction == "mean":
        total = shares.sum()
        shares = shares * torch.where(total == 0.0, 0.0, 1.0 / total)
        loss = losses.sum() * torch.where(total == 0.0, 0.0, 1.0 / total)
    else:
        loss = losses.sum() if reduction == "sum" else losses.view(targets.shape)
    if not wanted:
        return loss, x.new_empty(0), absent(x), absent(x), absent(x)
    with_dx, with_dweight = wants(wanted, 0, 2), wants(wanted, 3)
    dx = x.new_zeros(x.shape if with_dx else 0, dtype=torch.float32)
    dweight = torch.empty_like(weight) if with_dweight else absent(x)
    M = losses.numel()
    width = max(MIN_BLOCK, BLOCK_BYTES // max(1, M * x.element_size()) // PART * PART)
    for v0 in range(0, V if M else 0, width):
        block = own[v0 : v0 + width]
        dlogits = x.new_empty(*x.shape[:-1], block.shape[0])
        logits_grad_kernel[_grid(M, block.shape[0])](
            x, block, targets, sums, shares, dlogits, *(norm or NO_NORM), M, block.shape[0], K, v0,
            PRECISION=precision(), BN=PART,
        )  # fmt: skip
        if with_dx:
            dx = multiply(dlogits, block, residual=dx, dtype=torch.float32)
        if with_dweight:
            weight_grads(dlogits, x, block, None, norm, out=dweight[v0 : v0 + width])
    if not M:
        dweight.zero_()
    if norm is None or not with_dx:
        return loss, dx.to(x.dtype), absent(x), absent(x), dweight
    return loss, *norm_backward(dx, x, None, *norm, wanted=wanted), dweight


def _grid(M: int, V: int) -> Any:
    return lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(V, meta["BN"]),)


def _losses(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, norm: Norm | None
) -> tuple[Tensor, Tensor]:
    """Returns maxima and sums of exponentials of the logits, (2, M), and losses, (M,); float32."""
    (V, K), M = weight.shape, targets.numel()
    parts = triton.cdiv(V, PART)
    losses, target_logits = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    sums = x.new_empty(2, M, dtype=torch.float32)
    tops, totals = (x.new_empty(parts, M, dtype=torch.float32) for _ in range(2))
    if M:
        partial_sums_kernel[_grid(M, V)](
            x, weight, targets, tops, totals, target_logits, *(norm or NO_NORM), M, V, K,
            PRECISION=precision(), BN=PART,
        )  # fmt: skip
        losses_kernel[(triton.cdiv(M, 128),)](
            tops, totals, target_logits, targets, sums, losses, ignore_index, M, parts, BLOCK=128
        )
    return sums, losses
