"""Final norm, output projection and cross-entropy in blocks of rows.

The (M, V) logits never exist as a whole. A block of rows is multiplied by the weight; one kernel
reads each row of logits twice, first for its loss and then to write its gradient; two products turn
the gradients of the block into those of its activations and into a part of the weight's. So there
are three products in all, and the logits are never computed again.

Letters: M rows (all leading dimensions), K columns, V vocab_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.ops.triton.launch import ASSERTING, absent, block_of, precision, programs, wants
from gptfast.ops.triton.matmul import matmul
from gptfast.ops.triton.rows import add_parts, layer_norm, norm_backward
from gptfast.ops.triton.tiles import LN2, LOG2E

GRAD_BYTES = 1 << 27  # bytes of a block of the logits' gradient
LOGITS_BYTES = 1 << 26  # bytes of the float32 logits that exist at a time
ROWS_MULTIPLE = 128  # blocks have a multiple of so many rows, the products' tiles
COLUMNS_MULTIPLE = 64  # rows of logits have a stride of a multiple of so many elements
ROW_BLOCK = 4096  # columns of a row of logits that a program reads at a time
COUNT_BLOCK = 2048  # targets that a program counts at a time
# Up to this number of reads of targets, every program counts them, in place of a kernel for it.
COUNT_READS = 1 << 21
SMALL = 128  # a weight of at most so many rows and columns stays in the memory of a program
SMALL_ROWS, SMALL_WARPS = 32, 8
WARPS = 8
DN_WIDE = True
EXACT = True  # trial: float32 logits; or those of the activations' dtype
LOWEST = tl.constexpr(-2e38)


@triton.jit
def padded_kernel(weight, padded, n, padded_n, BLOCK: tl.constexpr):
    """Copies n elements, in the dtype of `padded`, whose rest is 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(weight + i, mask=i < n, other=0.0)
    tl.store(padded + i, value.to(padded.dtype.element_ty), mask=i < padded_n)


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


@triton.jit(do_not_specialize=["ignore_index"])
def total_kernel(targets, token_weights, total, ignore_index, M, BLOCK: tl.constexpr):
    """`total_weight` by one program."""
    tl.store(total, total_weight(targets, token_weights, ignore_index, M, BLOCK))


@triton.jit(do_not_specialize=["ignore_index", "first", "count"])
def loss_kernel(
    logits, dlogits, targets, token_weights, total, losses, ignore_index, first, count, M, V,
    columns, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Losses of `count` rows of logits s, those from row `first` of all, and the gradient of s.

    loss = (max_j s_j - s_target + ln sum_j exp(s_j - max)) share,
    ds_j = (exp(s_j - max) / sum - [j = target]) share,

    where the share of a row is its weight, or 1; of a mean divided by `total` (or by
    `total_weight`, without `total`); and 0 if its target is ignored. Rows have a stride of
    `columns`, which is a multiple of 16, so that loads are wide; the gradient of the columns from V
    on is 0. dlogits may be logits, or None.
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
        share *= tl.where(whole == 0.0, 0.0, 1.0 / whole)
    share = tl.where(counted, share, 0.0)

    row = r.to(tl.int64)[:, None] * columns
    target_logit = tl.load(logits + r.to(tl.int64) * columns + target, mask=counted, other=0.0)
    # From a finite value: -inf - (-inf), where a block of columns is -inf, would be nan.
    top = tl.full([ROWS], LOWEST, tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    for v0 in tl.range(0, columns, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        s = tl.load(logits + row + v[None, :], mask=inside[:, None] & (v < columns)[None, :])
        s = tl.where((v < V)[None, :], s.to(tl.float32), -float("inf"))
        both = tl.maximum(top, tl.max(s, 1))
        sums *= tl.exp2((top - both) * LOG2E)
        sums += tl.sum(tl.exp2((s - both[:, None]) * LOG2E), 1)
        top = both
    # max + ln sum would be rounded to the precision of max.
    loss = (top - target_logit.to(tl.float32)) + tl.log2(sums) * LN2
    tl.store(losses + m, tl.where(counted, loss * share, 0.0), mask=inside)

    if dlogits is not None:
        tl.debug_barrier()  # every thread has read the logits that others replace
        scale = 1.0 / sums
        for v0 in tl.range(0, columns, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            here = inside[:, None] & (v < columns)[None, :]
            s = tl.load(logits + row + v[None, :], mask=here)
            s = tl.where((v < V)[None, :], s.to(tl.float32), -float("inf"))
            ds = tl.exp2((s - top[:, None]) * LOG2E) * scale[:, None]
            ds -= tl.where(v[None, :] == target[:, None], 1.0, 0.0)
            ds = tl.where(share[:, None] == 0.0, 0.0, ds * share[:, None])
            tl.store(dlogits + row + v[None, :], ds.to(dlogits.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["ignore_index"])
def small_loss_kernel(
    x, ln_w, ln_b, weight, targets, token_weights, losses, dx, dweight, dln_w, dln_b,
    ignore_index, M, V, K, eps, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Norm, logits, losses and all gradients of blocks of BM rows; see `loss_kernel`.

    The weight stays in shared memory. dweight, dln_w and dln_b get this program's parts of the
    sums. dx None: no gradients.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    v, k = tl.arange(0, BV), tl.arange(0, BK)
    w = tl.load(
        weight + v[:, None] * K + k[None, :], mask=(v < V)[:, None] & (k < K)[None, :], other=0.0
    ).to(x.dtype.element_ty)
    mean_scale = 1.0
    if MEAN:
        whole = total_weight(targets, token_weights, ignore_index, M, COUNT)
        mean_scale = tl.where(whole == 0.0, 0.0, 1.0 / whole)
    dweight_total = tl.zeros([BV, BK], tl.float32)
    dln_w_total = tl.zeros([BK], tl.float32)
    dln_b_total = tl.zeros([BK], tl.float32)
    for m0 in tl.range(part * BM, M, parts * BM):
        m = m0 + tl.arange(0, BM)
        target = tl.load(targets + m, mask=m < M, other=ignore_index)
        known = (target >= 0) & (target < V)
        tl.device_assert(
            known | (target == ignore_index),
            "linear_cross_entropy: targets must be in [0, vocab_size) or ignore_index",
        )
        share = tl.full([BM], 1.0, tl.float32)
        if token_weights is not None:
            share = tl.load(token_weights + m, mask=m < M, other=0.0)
        counted = known & (target != ignore_index)
        share = tl.where(counted, share * mean_scale, 0.0)

        inside = (m < M)[:, None] & (k < K)[None, :]
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        n = tl.load(x + at, mask=inside, other=0.0)
        if ln_w is not None:  # xhat = (x - mean) rstd,  n = xhat w + b
            value = n.to(tl.float32)
            rest = tl.where(inside, value - (tl.sum(value, 1) / K)[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(rest * rest, 1) / K + eps)
            xhat = rest * rstd[:, None]
            scale = tl.load(ln_w + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            value = xhat * scale
            if ln_b is not None:
                value += tl.load(ln_b + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            n = value.to(n.dtype)

        s = tl.dot(n, tl.trans(w), input_precision=PRECISION)  # (BM, BV)
        s = tl.where((v < V)[None, :], s, -float("inf"))
        top = tl.max(s, 1)
        value = tl.exp2((s - top[:, None]) * LOG2E)
        sums = tl.sum(value, 1)
        hot = v[None, :] == target[:, None]
        target_logit = tl.sum(tl.where(hot, s, 0.0), 1)
        loss = (top - target_logit) + tl.log2(sums) * LN2
        tl.store(losses + m, tl.where(counted, loss * share, 0.0), mask=m < M)

        if dx is not None:
            weighted = (share != 0.0)[:, None]
            ds = (value / sums[:, None] - tl.where(hot, 1.0, 0.0)) * share[:, None]
            ds = tl.where(weighted, ds, 0.0)
            g = tl.dot(ds.to(n.dtype), w, input_precision=PRECISION)  # dn
            if ln_w is not None:  # dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dn w
                dln_w_total += tl.sum(g * xhat, 0)
                dln_b_total += tl.sum(g, 0)
                g *= scale
                g -= (tl.sum(g, 1) / K)[:, None] + xhat * (tl.sum(g * xhat, 1) / K)[:, None]
                g *= rstd[:, None]
            tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
            # dW = dS' N, with S' computed as such: a product's result is not transposed.
            s = tl.dot(w, tl.trans(n), input_precision=PRECISION)  # (BV, BM)
            s = tl.where((v < V)[:, None], s, -float("inf"))
            ds = tl.exp2((s - top[None, :]) * LOG2E) / sums[None, :]
            ds = (ds - tl.where(v[:, None] == target[None, :], 1.0, 0.0)) * share[None, :]
            ds = tl.where((share != 0.0)[None, :], ds, 0.0)
            dweight_total = tl.dot(ds.to(n.dtype), n, dweight_total, input_precision=PRECISION)
    if dx is not None:
        at = (tl.cast(part, tl.int64) * V + v)[:, None] * K + k[None, :]
        tl.store(dweight + at, dweight_total, mask=(v < V)[:, None] & (k < K)[None, :])
        if ln_w is not None:
            tl.store(dln_w + part * K + k, dln_w_total, mask=k < K)
            tl.store(dln_b + part * K + k, dln_b_total, mask=k < K)


def linear_cross_entropy(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    targets: Tensor, token_weights: Tensor | None, ignore_index: int, reduction: str, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_cross_entropy."""
    x, targets, (V, K) = x.contiguous(), targets.contiguous(), weight.shape
    if token_weights is not None:
        token_weights = token_weights.contiguous()
    if max(V, K) <= SMALL and x.element_size() == 2:
        return _by_one_kernel(
            x, ln_w, ln_b, weight, targets, token_weights, ignore_index, reduction, wanted
        )
    M, columns = targets.numel(), triton.cdiv(V, COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    own = _padded(weight, columns, x.dtype)
    with_dx, with_dweight = wants(wanted, 0, 2), wants(wanted, 3)
    n, mean, rstd = (x, None, None) if ln_w is None else layer_norm(x, ln_w, ln_b)
    if DN_WIDE:
        dn = x.new_empty(x.shape if with_dx else 0, dtype=torch.float32)
    else:
        dn = n if ln_w is not None or not with_dx else torch.empty_like(x)
    rows = _block_rows(M, columns * x.element_size(), GRAD_BYTES)
    logits = _Logits(n.view(M, K), own, targets, token_weights, ignore_index, reduction, V, columns)
    grads = x.new_empty(rows, columns) if wanted else None
    dweight = absent(x)
    if with_dweight:
        # A single block's product has the right dtype; several are added up in float32.
        sums = weight.dtype if rows >= M else torch.float32
        dweight = (own.new_empty if M else own.new_zeros)(own.shape, dtype=sums)
    for first in range(0, M, rows):
        block = slice(first, min(first + rows, M))
        logits.losses_of(block, grads)
        if grads is None:
            continue
        dlogits = grads[: block.stop - first, : own.shape[0]]
        part = n.view(M, K)[block]
        if with_dweight:
            matmul(dlogits.t(), part, dweight.dtype, out=dweight, accumulate=first > 0)
        if with_dx:
            matmul(dlogits, own, dn.dtype, out=dn.view(M, K)[block])
    loss = logits.losses.view(targets.shape) if reduction == "none" else logits.losses.sum()
    dweight = dweight[:V].to(weight.dtype) if with_dweight else dweight
    if not with_dx:
        return loss, x.new_empty(0), absent(x), absent(x), dweight
    if ln_w is None or mean is None or rstd is None:
        return loss, dn.to(x.dtype), absent(x), absent(x), dweight
    return loss, *norm_backward(dn, x, None, mean, rstd, ln_w, ln_b, wanted=wanted), dweight


def _padded(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight in `dtype`, with rows of zeros up to `columns` if that is of 2 bytes.

    cuBLAS multiplies matrices of an odd number of columns three times slower. float32 takes no tensor cores...
    """
    V, K = weight.shape
    if dtype.itemsize != 2 or columns == V:
        return weight.to(dtype)
    padded = weight.new_empty(columns, K, dtype=dtype)
    padded_kernel[(triton.cdiv(columns * K, 2048),)](
        weight, padded, V * K, columns * K, BLOCK=2048, num_warps=4
    )
    return padded


def _by_one_kernel(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    targets: Tensor, token_weights: Tensor | None, ignore_index: int, reduction: str, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_cross_entropy of a small weight."""
    M, (V, K) = targets.numel(), weight.shape
    losses = x.new_empty(M, dtype=torch.float32)
    parts = max(1, min(programs(x.device), triton.cdiv(M, SMALL_ROWS)))
    dx = dweight = dln = None
    if wanted:
        dx, dweight = torch.empty_like(x), x.new_empty(parts, V, K, dtype=torch.float32)
        dln = x.new_empty(2, parts, K, dtype=torch.float32)
    small_loss_kernel[(parts,)](
        x, ln_w, ln_b, weight, targets, token_weights, losses, dx, dweight,
        None if dln is None else dln[0], None if dln is None else dln[1],
        ignore_index, M, V, K, LAYER_NORM_EPS, MEAN=reduction == "mean", PRECISION=precision(),
        BM=SMALL_ROWS, BV=block_of(V), BK=block_of(K), COUNT=COUNT_BLOCK, num_warps=SMALL_WARPS,
        **ASSERTING,
    )  # fmt: skip
    loss = losses.view(targets.shape) if reduction == "none" else losses.sum()
    if dx is None or dweight is None or dln is None:
        return loss, x.new_empty(0), absent(x), absent(x), absent(x)

    def total(i: int, sums: Tensor, like: Tensor | None) -> Tensor:
        if like is None or not wants(wanted, i):
            return absent(x)
        return add_parts(sums, torch.empty_like(like))

    return (
        loss,
        dx if wants(wanted, 0, 2) else x.new_empty(0),
        total(1, dln[0], ln_w), total(2, dln[1], ln_b), total(3, dweight, weight),
    )  # fmt: skip


class _Logits:
    """Logits, losses and gradients of blocks of rows.

    Logits are float32 whatever the activations are: rounded to bfloat16 they would make the loss
    less exact than its products are. They exist for few rows at a time, whose gradients go to
    another tensor; where that is float32 too, they take the logits' place.
    """

    def __init__(
        self, n: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None,
        ignore_index: int, reduction: str, V: int, columns: int,
    ) -> None:  # fmt: skip
        self.n, self.weight = n, weight
        self.M, self.V, self.columns = n.shape[0], V, columns
        self.block = block_of(min(columns, ROW_BLOCK))
        self.rows = max(1, ROW_BLOCK // self.block)
        self.losses = n.new_empty(self.M, dtype=torch.float32)
        mean = reduction == "mean"
        total = None
        if mean and triton.cdiv(self.M, self.rows) * self.M > COUNT_READS:
            total = n.new_empty(1, dtype=torch.float32)
            total_kernel[(1,)](
                targets, token_weights, total, ignore_index, self.M, BLOCK=COUNT_BLOCK, num_warps=8
            )
        self.arguments = targets, token_weights, total, self.losses, ignore_index
        self.mean = mean
        self.limit = _block_rows(self.M, columns * 4, LOGITS_BYTES)
        self.memory: Tensor | None = None

    def losses_of(self, block: slice, grads: Tensor | None) -> None:
        """Computes the losses of a block of rows, and the gradient of its logits if there is room.

        grads (rows, columns) receives it.
        """
        dtype = torch.float32 if EXACT else self.n.dtype
        in_place = grads is not None and grads.dtype == dtype
        limit = block.stop - block.start if in_place else self.limit
        if not in_place and self.memory is None:
            self.memory = self.n.new_empty(limit, self.columns, dtype=dtype)
        for first in range(block.start, block.stop, limit):
            rows = slice(first, min(first + limit, block.stop))
            count = rows.stop - first
            dlogits = None if grads is None else grads[first - block.start :][:count]
            logits = dlogits if in_place else self.memory
            assert logits is not None
            out = logits[:count, : self.weight.shape[0]]
            matmul(self.n[rows], self.weight.t(), dtype, out=out)
            loss_kernel[(triton.cdiv(count, self.rows),)](
                logits, dlogits, *self.arguments, first, count, self.M, self.V, self.columns,
                MEAN=self.mean, ROWS=self.rows, BLOCK=self.block, COUNT=COUNT_BLOCK,
                num_warps=WARPS, **ASSERTING,
            )  # fmt: skip


def _block_rows(M: int, bytes_per_row: int, limit: int) -> int:
    """Returns the rows of blocks of M rows: of one size, of about `limit` bytes at most."""
    most = max(1, limit // bytes_per_row // ROWS_MULTIPLE) * ROWS_MULTIPLE
    blocks = max(1, triton.cdiv(M, most))
    return max(1, min(M, triton.cdiv(triton.cdiv(M, blocks), ROWS_MULTIPLE) * ROWS_MULTIPLE))
