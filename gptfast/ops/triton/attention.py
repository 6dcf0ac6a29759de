"""Causal attention in blocks with an online softmax (FlashAttention-2, arXiv:2307.08691).

Query i attends to the keys j <= i + Tk - Tq. The blocks of keys that no query of a program masks
come first; the blocks on the diagonal, which need a mask, follow.

Letters: B batch, T time (Tq queries, Tk keys), H heads, D head_dim.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import block_of, config, dropout_args, precision, tuned
from gptfast.ops.triton.tiles import dropout_factors, own_head


@triton.jit
def head_rows(x, t, stride, T, d, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows t of a head, (rows, BLOCK_D); columns from D on and, if MASKED, rows from T on are 0."""
    at = x + t.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit
def held_rows(
    x, t, stride, T, d, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows t of a head for `row_products`: a loaded tile, or just the address if PART < BLOCK_D."""
    if PART == BLOCK_D:
        rows = head_rows(x, t, stride, T, d, D, BLOCK_D, MASKED)
    else:
        rows = x
    return rows


@triton.jit
def row_products(
    x, i, x_row, Tx, y, j, y_row, Ty,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """x y' for rows i of x and rows j of y, PART columns at a time."""
    if PART == BLOCK_D:
        products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        products = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for d0 in tl.static_range(0, BLOCK_D, PART):
            d = d0 + tl.arange(0, PART)
            rows = head_rows(x, i, x_row, Tx, d, D, BLOCK_D, True)
            columns = head_rows(y, j, y_row, Ty, d, D, BLOCK_D, True)
            products = tl.dot(rows, tl.trans(columns), products, input_precision=PRECISION)
    return products


@triton.jit
def _attend(
    acc, m, total, q, k, v, q_row, k_row, v_row, i, i0, first, last, Tq, Tk, offset, scale_log2,
    head, seed, substream, threshold, keep_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Updates running maximum m, sum and output acc of a block of queries by keys [first, last).

    s = q k',  m' = max(m, max_j s_j),  sum' = sum 2^(c (m - m')) + sum_j 2^(c (s_j - m')),
    acc' = acc 2^(c (m - m')) + dropout(2^(c (s - m'))) v,  with c = scale log2(e) >= 0.

    s - m' is computed before scaling: it is exact near the maximum, however large s is.
    """
    d = tl.arange(0, BLOCK_D)
    for j0 in tl.range(first, last, BN):
        j = j0 + tl.arange(0, BN)
        keys = held_rows(k, j, k_row, Tk, d, D, BLOCK_D, PART, MASKED)
        s = row_products(q, i, q_row, Tq, keys, j, k_row, Tk, PRECISION, D, BLOCK_D, PART)
        if MASKED:
            seen = (j[None, :] <= i[:, None] + offset) & (j < Tk)[None, :]
            s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(top == -float("inf"), 0.0, top)  # all keys so far may be masked
        p = tl.exp2((s - finite[:, None]) * scale_log2)
        if MASKED:
            p = tl.where(seen, p, 0.0)
        shrink = tl.where(m == -float("inf"), 0.0, tl.exp2((m - finite) * scale_log2))
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            p *= dropout_factors(
                tl.load(seed), substream, head, i0, j0, threshold, keep_scale, BM, BN
            )
        values = head_rows(v, j, v_row, Tk, d, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        m = top
    return acc, m, total


def head_kind(args: Any) -> tuple[int, int]:
    """Returns the kind of a call for `tuned`: bytes per element, D rounded up to 64, 128 or 256."""
    return args["q"].element_size(), max(64, block_of(args["D"]))


def parts_of(x: Tensor) -> dict[str, int]:
    """Returns D, D padded to a power of 2, and the number of columns that are multiplied at once.

    256 columns of float32 at once, each split for three tf32 products, would spill registers.
    """
    columns = block_of(x.shape[-1])
    wide = columns == 256 and x.element_size() == 4
    return {"D": x.shape[-1], "BLOCK_D": columns, "PART": 64 if wide else columns}


def head_shared(staying: int, passing: int, args: Any) -> int:
    """Returns bytes of `staying` resident rows of a head and `passing` rows per pipeline stage."""
    rows = staying + args["num_stages"] * passing
    return rows * block_of(args["D"]) * args["q"].element_size()


# Tile sizes: BM queries, BN keys.
FORWARD = {
    (2, 64): [config(8, 3, BM=128, BN=64), config(8, 2, BM=64, BN=32)],
    (2, 128): [config(8, 3, BM=128, BN=64), config(8, 2, BM=64, BN=32)],
    (2, 256): [config(8, 2, BM=64, BN=32), config(4, 1, BM=32, BN=32)],
    (4, 64): [config(8, 1, BM=32, BN=16), config(4, 1, BM=16, BN=16)],
    (4, 128): [config(8, 1, BM=32, BN=16), config(4, 1, BM=16, BN=16)],
    (4, 256): [config(4, 1, BM=16, BN=16)],
}


@tuned(
    FORWARD,
    head_kind,
    lambda args: head_shared(args["BM"], 2 * args["BN"], args),
    ["D", "PRECISION"],
)
@triton.jit(do_not_specialize=["substream", "threshold", "Tq", "Tk"])
def forward_kernel(
    q, k, v, out, lse, H, Tq, Tk, scale_log2,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, out_b, out_h, out_row,
    seed, substream, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of BM queries of one head; the blocks with the most keys start first."""
    head, b, h, i0 = own_head(H, Tq, BM, True)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    i, d = i0 + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    offset = Tk - Tq
    queries = held_rows(q, i, q_row, Tq, d, D, BLOCK_D, PART, True)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    # No query masks a key before `whole`; every query masks the keys from `last` on.
    whole = tl.maximum(i0 + 1 + offset, 0) // BN * BN
    last = tl.minimum(Tk, i0 + BM + offset)
    acc, m, total = _attend(
        acc, m, total, queries, k, v, q_row, k_row, v_row, i, i0, 0, whole, Tq, Tk, offset,
        scale_log2, head, seed, substream, threshold, keep_scale,
        False, PRECISION, D, BLOCK_D, PART, BM, BN,
    )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, queries, k, v, q_row, k_row, v_row, i, i0, whole, last, Tq, Tk, offset,
        scale_log2, head, seed, substream, threshold, keep_scale,
        True, PRECISION, D, BLOCK_D, PART, BM, BN,
    )  # fmt: skip
    some = i + offset >= 0  # some key is unmasked; if all its scores are -inf, the row is 0 / 0
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    at = out + i.to(tl.int64)[:, None] * out_row + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(i < Tq)[:, None] & (d < D)[None, :])
    lse += head.to(tl.int64) * 2 * Tq
    tl.store(lse + i, m, mask=i < Tq)
    tl.store(lse + Tq + i, total, mask=i < Tq)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """gptfast::attention."""
    B, H, Tq, D = q.shape
    out, lse = q.new_empty(B, Tq, H, D), q.new_empty(B, H, 2, Tq, dtype=torch.float32)
    if lse.numel():
        heads = out.transpose(1, 2)
        grid = lambda meta: (triton.cdiv(Tq, meta["BM"]) * B * H,)  # noqa: E731
        forward_kernel[grid](
            q, k, v, heads, lse, H, Tq, k.shape[2], scale / math.log(2),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *heads.stride()[:3],
            **dropout_args(dropout_p, seed, stream, q.device), **parts_of(q),
            PRECISION=precision(),
        )  # fmt: skip
    return out, lse
