"""Final norm, output projection and cross-entropy in blocks of rows.

The (M, V) logits never exist as a whole. A block of rows is multiplied by the weight; one kernel
reads each row of logits for its loss, and again to replace it by its gradient; two products turn
the block's gradient into the gradient of its activations and a part of the weight's. So there are
three products in all, and no logits are computed twice.

Logits are rounded to the dtype of the activations before the softmax, as torch's are under
autocast; everything after that is float32. On an H100, float32 logits cost 17 % of the whole (bf16,
16384 x 768 x 50257). Sums of exponentials before the rounding, made with the product, cost little,
but the gradient of a confident row, exp(s_j - max) / sum - 1, would then be the rounding's error.

Letters: M rows (all leading dimensions), K columns, V vocab_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.casts import padded
from gptfast.ops.triton.launch import ASSERTING, absent, block_of, cdiv, kernel, wants
from gptfast.ops.triton.matmul import matmul
from gptfast.ops.triton.rows import layer_norm, norm_backward
from gptfast.ops.triton.tiles import LN2, LOG2E

# Bytes of the logits of a block of rows. Every block adds its part to the weight's gradient, all of
# which passes through memory each time: on an H100 blocks of 128 MB take 10 % longer than those of
# 256 MB.
BLOCK_BYTES = 200 << 20
ROWS_MULTIPLE = 128  # rows of the products' tiles; blocks have a multiple of so many
COLUMNS_MULTIPLE = 64  # rows of logits have a stride of a multiple of so many elements
# Bytes of a row that a program of `loss_kernel` reads at a time. In bfloat16 two programs of 16
# warps run on a multiprocessor of an H100, so that the L2 cache can hold what they read twice.
ROW_BYTES = 32768
SMALL_BLOCK = 4096  # elements of several short rows
WARP_BLOCK = 1024  # elements of a warp, 32 per thread
COUNT_BLOCK = 2048  # targets that a program counts at a time
# Every program of `loss_kernel` counts the targets if they read at most so many in all; otherwise
# a kernel of its own counts them.
COUNT_READS = 1 << 21
LOWEST = tl.constexpr(-2e38)


@triton.jit
def total_weight(targets, token_weights, ignore_index, M, BLOCK: tl.constexpr):
    """The sum of the weights of all targets but `ignore_index`; without weights, their number."""
    total = tl.zeros([BLOCK], tl.float32)
    for m0 in tl.range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        counted = tl.load(targets + m, mask=m < M, other=ignore_index) != ignore_index
        share = tl.full([BLOCK], 1.0, tl.float32)
        if token_weights is not None:
            share = tl.load(token_weights + m, mask=m < M, other=0.0)
        total += tl.where(counted, share, 0.0)
    return tl.sum(total, 0)


@kernel
@triton.jit(do_not_specialize=["ignore_index"])
def total_kernel(targets, token_weights, total, ignore_index, M, BLOCK: tl.constexpr):
    """`total_weight` by one program."""
    tl.store(total, total_weight(targets, token_weights, ignore_index, M, BLOCK))


@triton.jit
def scores(logits, row, v0, V, columns, wanted, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Loads BLOCK columns of logits from v0 on; returns their addresses and values.

    WHOLE says that all of these columns are below V; otherwise those from V on are -inf. Below V,
    rows that are not `wanted` are 0.
    """
    v = v0 + tl.arange(0, BLOCK)
    at = logits + row[:, None] + v[None, :]
    here = wanted[:, None] if WHOLE else wanted[:, None] & (v < columns)[None, :]
    s = tl.load(at, mask=here, other=0.0).to(tl.float32)
    return at, s if WHOLE else tl.where((v < V)[None, :], s, -float("inf"))


@triton.jit
def add_scores(
    logits, row, v0, V, columns, inside, reference, smoothing, top, sums, shifted,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Advances the online softmax of each lane, which belongs to one thread, by BLOCK columns:

    top' = max(top, max_j s_j),  sums' = sums exp(top - top') + sum_j exp(s_j - top'),
    and for label smoothing shifted' = shifted + sum_j (s_j - reference).
    """
    _, s = scores(logits, row, v0, V, columns, inside, WHOLE, BLOCK)
    own = tl.reshape(s, [ROWS, BLOCK // (LANES * VECTOR), LANES, VECTOR])
    both = tl.maximum(top, tl.max(tl.max(own, 3), 1))
    sums *= tl.exp2((top - both) * LOG2E)
    sums += tl.sum(tl.sum(tl.exp2((own - both[:, None, :, None]) * LOG2E), 3), 1)
    if smoothing is not None:
        rest = s - reference[:, None]
        if not WHOLE:
            rest = tl.where((v0 + tl.arange(0, BLOCK) < V)[None, :], rest, 0.0)
        shifted += tl.sum(tl.sum(tl.reshape(rest, own.shape), 3), 1)
    return both, sums, shifted


@triton.jit
def replace_scores(
    logits, row, v0, V, columns, kept, inside, smoothing, top, factor, share,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces BLOCK columns by their gradients, without the target's part."""
    at, s = scores(logits, row, v0, V, columns, kept, WHOLE, BLOCK)
    ds = tl.exp2((s - top[:, None]) * LOG2E) * factor[:, None]
    v = v0 + tl.arange(0, BLOCK)
    if smoothing is not None:
        uniform = smoothing / V * share[:, None]
        ds -= uniform if WHOLE else tl.where((v < V)[None, :], uniform, 0.0)
    here = inside[:, None] if WHOLE else inside[:, None] & (v < columns)[None, :]
    tl.store(at, ds.to(logits.dtype.element_ty), mask=here)


@kernel
@triton.jit(do_not_specialize=["ignore_index", "first", "count"])
def loss_kernel(
    logits, targets, token_weights, total, losses, ignore_index, smoothing, first, count, M, V,
    columns,
    MEAN: tl.constexpr, GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Losses of `count` rows of logits s, the rows from `first` on; replaces s by its gradient.

    loss = (max_j s_j - s_target + ln sum_j exp(s_j - max)) share,
    ds_j = (exp(s_j - max) / sum - [j = target]) share,

    and with label smoothing e

    loss = ((1 - e) (max - s_target) - e / V sum_j (s_j - max) + ln sum_j exp(s_j - max)) share,
    ds_j = (exp(s_j - max) / sum - (1 - e) [j = target] - e / V) share,

    where the share of a row is its weight, or 1 without weights; a mean divides it by the sum of
    all weights, which is `total` or, without it, counted here. An ignored target has share 0. Rows
    have a stride of `columns`, a multiple of 16, so that loads are wide; the gradient of columns
    from V on is 0.

    An H100 moves the four bytes of a logit in the time of 39 instructions, most of which pass while
    its warps wait. So the loops have 14: only the last block of columns has masks, the target's own
    part is subtracted from one logit, not from all, and each thread has a maximum and a sum of its
    own ("lane") until the end of the row.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = first + r
    inside = r < count
    target = tl.load(targets + m, mask=inside, other=ignore_index)
    known = (target >= 0) & (target < V)
    tl.device_assert(
        known | (target == ignore_index),
        "linear_cross_entropy: targets must be in [0, vocab_size) or ignore_index",
    )
    counted = known & (target != ignore_index)
    share = tl.full([ROWS], 1.0, tl.float32)
    if token_weights is not None:
        share = tl.load(token_weights + m, mask=inside, other=0.0)
    if MEAN:
        if total is None:
            whole = total_weight(targets, token_weights, ignore_index, M, COUNT)
        else:
            whole = tl.load(total)
        share = tl.where(whole == 0.0, 0.0, share / whole)
    share = tl.where(counted, share, 0.0)

    row = r.to(tl.int64) * columns
    at_target = logits + row + target
    target_logit = tl.load(at_target, mask=counted, other=0.0).to(tl.float32)
    # Starts finite: in a block of columns that are -inf, -inf - (-inf) would be nan.
    tops = tl.full([ROWS, LANES], LOWEST, tl.float32)
    sums = tl.zeros([ROWS, LANES], tl.float32)
    shifted = tl.zeros([ROWS, LANES], tl.float32)
    # Any finite number will do; one close to the scores keeps their precision.
    reference = tl.where(target_logit > LOWEST, target_logit, 0.0)
    last = V // BLOCK * BLOCK
    for v0 in tl.range(0, last, BLOCK):
        tops, sums, shifted = add_scores(
            logits, row, v0, V, columns, inside, reference, smoothing, tops, sums, shifted,
            True, ROWS, BLOCK, LANES, VECTOR,
        )  # fmt: skip
    tops, sums, shifted = add_scores(
        logits, row, last, V, columns, inside, reference, smoothing, tops, sums, shifted,
        False, ROWS, LAST, LANES, VECTOR,
    )  # fmt: skip
    top = tl.max(tops, 1)
    exp_sum = tl.sum(sums * tl.exp2((tops - top[:, None]) * LOG2E), 1)
    # max + ln sum would be rounded to the precision of max.
    loss = top - target_logit
    if smoothing is not None:
        loss = (1.0 - smoothing) * loss + smoothing * (top - reference)
        loss -= smoothing / V * tl.sum(shifted, 1)
    loss += tl.log2(exp_sum) * LN2
    tl.store(losses + m, tl.where(counted, loss * share, 0.0), mask=inside)

    if GRAD:
        tl.debug_barrier()  # every thread has read the logits that others replace
        kept = share != 0.0  # of other rows nothing is read, because 0 times inf would be nan
        top = tl.where(kept, top, 0.0)
        scale = tl.where(kept, 1.0 / exp_sum, 0.0)
        for v0 in tl.range(0, last, BLOCK):
            replace_scores(
                logits, row, v0, V, columns, kept, inside, smoothing, top, scale * share, share,
                True, BLOCK,
            )  # fmt: skip
        replace_scores(
            logits, row, last, V, columns, kept, inside, smoothing, top, scale * share, share,
            False, LAST,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has written what one of them now corrects
        ds = tl.exp2((target_logit - top) * LOG2E) * scale - 1.0
        if smoothing is not None:
            ds += smoothing - smoothing / V
        tl.store(at_target, (ds * share).to(logits.dtype.element_ty), mask=kept)


def linear_cross_entropy(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    targets: Tensor, token_weights: Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_cross_entropy."""
    x, targets, (V, K) = x.contiguous(), targets.contiguous(), weight.shape
    token_weights = None if token_weights is None else token_weights.contiguous()
    M, columns = targets.numel(), cdiv(V, COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    with_dx, with_dweight = wants(wanted, 0, 2), wants(wanted, 3)
    n, mean, rstd = (x, None, None) if ln_w is None else layer_norm(x, ln_w, ln_b)
    n = n.view(M, K)
    # Products of 2-byte numbers take the fast matrix instructions only if their sizes are multiples
    # of 16 bytes.
    own = padded(weight, columns if x.element_size() == 2 else V, x.dtype)
    width = own.shape[0]

    rows = _block_rows(M, columns * x.element_size())
    logits, losses = x.new_empty(rows, columns), x.new_empty(M, dtype=torch.float32)
    tile, warps = _loss_tile(V, columns, x.element_size())
    total, smoothing = None, label_smoothing or None
    if reduction == "mean" and cdiv(M, tile["ROWS"]) * M > COUNT_READS:
        total = losses.new_empty(1)
        total_kernel[(1,)](
            targets, token_weights, total, ignore_index, M, BLOCK=COUNT_BLOCK, num_warps=8
        )
    # The product of a single block has the right dtype; products of several add up in float32.
    dtype = weight.dtype if rows >= M else torch.float32
    dweight = (own.new_empty if M else own.new_zeros)(own.shape if with_dweight else 0, dtype=dtype)
    # The gradient of a block of n overwrites it; x belongs to the caller, so it stays.
    dn = n if ln_w is not None or not with_dx else torch.empty_like(n)
    for first in range(0, M, rows):
        part = n[first : first + rows]
        count = part.shape[0]
        own_logits = logits[:count, :width]
        matmul(part, own.t(), out=own_logits)
        loss_kernel[(cdiv(count, tile["ROWS"]),)](
            logits, targets, token_weights, total, losses, ignore_index, smoothing, first, count,
            M, V, columns, MEAN=reduction == "mean", GRAD=wanted != 0, COUNT=COUNT_BLOCK, **tile,
            num_warps=warps, **ASSERTING,
        )  # fmt: skip
        if with_dweight:
            matmul(own_logits.t(), part, dtype, out=dweight, accumulate=first > 0)
        if with_dx:
            matmul(own_logits, own, out=dn[first : first + count])
    loss = losses.view(targets.shape) if reduction == "none" else losses.sum()
    dweight = dweight[:V].to(weight.dtype) if with_dweight else absent(x)
    if not with_dx:
        return loss, x.new_empty(0), absent(x), absent(x), dweight
    dn = dn.view(x.shape)
    if ln_w is None or mean is None or rstd is None:
        return loss, dn, absent(x), absent(x), dweight
    return loss, *norm_backward(dn, x, None, mean, rstd, ln_w, ln_b, wanted=wanted), dweight


def _block_rows(M: int, bytes_per_row: int) -> int:
    """Returns how many rows a block has: blocks are of one size, of BLOCK_BYTES at most."""
    most = max(1, BLOCK_BYTES // bytes_per_row // ROWS_MULTIPLE) * ROWS_MULTIPLE
    blocks = max(1, cdiv(M, most))
    return max(1, min(M, cdiv(cdiv(M, blocks), ROWS_MULTIPLE) * ROWS_MULTIPLE))


def _loss_tile(V: int, columns: int, itemsize: int) -> tuple[dict[str, int], int]:
    """Returns the tile sizes of `loss_kernel` and its warps, which have 32 elements per thread."""
    block = block_of(min(columns, ROW_BYTES // itemsize))
    several = max(1, SMALL_BLOCK // block) if columns <= block else 1
    warps = max(block, SMALL_BLOCK) // WARP_BLOCK
    vector = 16 // itemsize  # columns that a thread reads at once
    lanes = min(block // vector, 32 * warps)
    last = block_of(columns - V // block * block, lanes * vector)
    tile = {"ROWS": several, "BLOCK": block, "LAST": last, "LANES": lanes, "VECTOR": vector}
    return tile, warps
