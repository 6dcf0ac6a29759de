"""Causal attention in blocks with an online softmax (FlashAttention-2, arXiv:2307.08691).

Query i attends to the keys j <= i + Tk - Tq. A program handles a block of queries and loops over
the blocks of keys; only the last ones, on the diagonal, need a mask.

Letters: B batch, T time (Tq queries, Tk keys), H heads, D head_dim.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import (
    INTERPRETED,
    block_of,
    cdiv,
    config,
    copies_tiles,
    descriptor,
    dropout_args,
    precision,
    tuned,
)
from gptfast.ops.triton.tiles import dropped_rows, kept_of, own_head

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def head_rows(
    x, tiles, b, h, t0, stride, T, d, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """Rows t0 to t0 + ROWS of head h of batch b, (ROWS, BLOCK_D); 0 from row T and column D on.

    It reads through `tiles`, a descriptor of all heads, or, if that is None, from x, the address of
    this head.
    """
    if tiles is not None:
        tile = tl.reshape(tiles.load([b.to(tl.int32), h.to(tl.int32), t0, 0]), (ROWS, BLOCK_D))
    else:
        row = tl.arange(0, ROWS)
        # Only one number depends on t0: a loop over t0 adds it to addresses computed once.
        at = x + tl.cast(t0, tl.int64) * stride + (row.to(tl.int64)[:, None] * stride + d[None, :])
        tile = tl.load(at, mask=(row < T - t0)[:, None] & (d < D)[None, :], other=0.0)
    return tile


@triton.jit
def held_rows(
    x, tiles, b, h, t0, stride, T, d, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of a head for `row_products`: a loaded tile, or just the address if PART < BLOCK_D."""
    if PART == BLOCK_D:
        rows = head_rows(x, tiles, b, h, t0, stride, T, d, D, BLOCK_D, ROWS)
    else:
        rows = x
    return rows


@triton.jit
def row_products(
    x, i0, x_row, Tx, y, j0, y_row, Ty, start,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """start + x y' for ROWS rows of x from i0 and COLUMNS of y from j0, PART columns at a time."""
    products = start
    if PART == BLOCK_D:
        products = _add_product(x, y, products, PRECISION)
    else:
        for d0 in tl.static_range(0, BLOCK_D, PART):
            d = d0 + tl.arange(0, PART)
            rows = head_rows(x, None, 0, 0, i0, x_row, Tx, d, D, BLOCK_D, ROWS)
            columns = head_rows(y, None, 0, 0, j0, y_row, Ty, d, D, BLOCK_D, COLUMNS)
            products = _add_product(rows, columns, products, PRECISION)
    return products


@triton.jit
def _add_product(x, y, start, PRECISION: tl.constexpr):
    """start + x y'. tl.dot does it, except that its tf32x3 makes NaN of a product that overflows.

    With x = x0 + x1, where x0 is x rounded to tf32, x y' is x0 y0' + x0 y1' + x1 y0'. If the first
    is infinite, the others may be infinities of the other sign, so they only count where finite.
    """
    y = tl.trans(y)
    if PRECISION == "tf32x3":
        x0, y0 = _to_tf32(x), _to_tf32(y)
        small = tl.dot(x - x0, y0, input_precision="tf32")
        small = tl.dot(x0, y - y0, small, input_precision="tf32")
        small = tl.where(tl.abs(small) < float("inf"), small, 0.0)
        product = start + tl.dot(x0, y0, small, input_precision="tf32")
    else:
        product = tl.dot(x, y, start, input_precision=PRECISION)
    return product


@triton.jit
def _to_tf32(x):
    """x rounded to the 10 bits of tf32's mantissa."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


def head_kind(args: Any) -> tuple[int, int, bool]:
    """Returns the kind of a call for `tuned`.

    It consists of the bytes per element, D rounded up to 64, 128 or 256, and whether there are
    descriptors.
    """
    return args["q"].element_size(), max(64, block_of(args["D"])), args["TILES"]


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


def row_tiles(*tensors: Tensor) -> bool:
    """Whether blocks of rows of these (B, H, T, D) can be loaded by descriptors.

    From sm_90 on, the chip itself copies such a block, so threads need not compute addresses. All
    strides but the last, and the first address, must be multiples of 16 bytes. float32 does without
    descriptors: its products split it in registers, into which threads load it just as well.
    """
    if not (INTERPRETED or copies_tiles()):
        return False
    for x in tensors:  # all() of generators would take 5 us
        b, h, row, _ = x.stride()
        aligned = x.data_ptr() % 16 == 0 and (b | h | row) % 8 == 0
        if not (aligned and b and h and row and x.element_size() == 2 and x.numel()):
            return False
    return True


def descriptors(tiles: bool, rows: int, *tensors: Tensor) -> list[Any]:
    """Returns descriptors for blocks of so many rows of each tensor; without `tiles` None for each.

    `rows` must be the block size of the configuration that the call takes.
    """
    if not tiles:
        return [None] * len(tensors)
    return [descriptor(x, 1, 1, rows, block_of(x.shape[3])) for x in tensors]


def log2_scale(scale: float) -> float:
    """Returns scale log2(e), but at least 1e-37: a masked score, -inf, then weighs 0 at scale 0."""
    return max(scale / math.log(2), 1e-37)


# Tile sizes: BM queries, BN keys.
FORWARD = {
    (2, 64, True): [config(4, 3, BM=64, BN=64)],
    (2, 128, True): [config(4, 3, BM=64, BN=64)],
    (2, 256, True): [config(4, 2, BM=64, BN=32)],
    (2, 64, False): [config(8, 3, BM=128, BN=64)],
    (2, 128, False): [
        config(8, 3, BM=128, BN=64),
        config(8, 2, BM=128, BN=64),
        config(4, 1, BM=32, BN=64),
    ],
    (2, 256, False): [config(8, 2, BM=64, BN=32), config(4, 1, BM=32, BN=32)],
    (4, 64, False): [config(8, 1, BM=32, BN=16)],
    (4, 128, False): [config(8, 1, BM=32, BN=16)],
    (4, 256, False): [config(4, 1, BM=16, BN=16)],
}


@tuned(
    FORWARD,
    head_kind,
    lambda args: head_shared(args["BM"], 2 * args["BN"], args),
    ["D", "PRECISION", "TILES"],
)
@triton.jit(do_not_specialize=["substream", "threshold", "Tq", "Tk"])
def forward_kernel(
    q, k, v, out, lse, k_tiles, v_tiles, H, Tq, Tk, scale_log2,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, out_b, out_h, out_row,
    seed, substream, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block of BM queries of one head; the blocks with the most keys start first.

    Over the blocks of keys it updates the running maximum m, the sum of weights, and the output:

    s = q k',  m' = max(m, max_j s_j),  sum' = sum 2^(c (m - m')) + sum_j 2^(c (s_j - m')),
    acc' = acc 2^(c (m - m')) + dropout(2^(c (s - m'))) v,  with c = scale log2(e) > 0.

    s - m' is computed before scaling: it is exact near the maximum, however large s is. m is finite
    from the start, or +inf, so that scores of -inf have the weight 0.
    """
    head, b, h, i0 = own_head(H, Tq, BM, True)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    i, d = i0 + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    offset = Tk - Tq
    queries = held_rows(q, None, b, h, i0, q_row, Tq, d, D, BLOCK_D, PART, BM)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    m = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    if seed is not None:
        key = tl.load(seed)
    # No query masks a key before `whole`; every query masks the keys from `last` on. A loop that
    # branches on j0 >= whole instead is slower with dropout.
    whole = tl.maximum(i0 + 1 + offset, 0) // BN * BN
    last = tl.minimum(Tk, i0 + BM + offset)
    for MASKED in tl.static_range(2):
        for j0 in tl.range(whole if MASKED else 0, last if MASKED else whole, BN):
            keys = held_rows(k, k_tiles, b, h, j0, k_row, Tk, d, D, BLOCK_D, PART, BN)
            s = row_products(
                queries, i0, q_row, Tq, keys, j0, k_row, Tk, tl.zeros([BM, BN], tl.float32),
                PRECISION, D, BLOCK_D, PART, BM, BN,
            )  # fmt: skip
            if MASKED:
                j = j0 + tl.arange(0, BN)
                s = tl.where(j[None, :] <= i[:, None] + offset, s, -float("inf"))
            top = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2((s - top[:, None]) * scale_log2)
            shrink = tl.exp2((m - top) * scale_log2)
            total = total * shrink + tl.sum(p, 1)
            if seed is not None:
                dropped = dropped_rows(key, substream, head, i0, j0, threshold, BM, BN)
                p = tl.where(kept_of(dropped, BM, BN), p, 0.0)
            values = head_rows(v, v_tiles, b, h, j0, v_row, Tk, d, D, BLOCK_D, BN)
            acc = tl.dot(
                p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION
            )
            m = top
    some = i + offset >= 0  # some key is unmasked; if all its scores are -inf, the row is 0 / 0
    weight = 1.0 / tl.where(some, total, 1.0)
    if seed is not None:
        weight *= keep_scale
    acc = tl.where(some[:, None], acc * weight[:, None], 0.0)
    at = out + i.to(tl.int64)[:, None] * out_row + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(i < Tq)[:, None] & (d < D)[None, :])
    lse += head.to(tl.int64) * 2 * Tq
    tl.store(lse + i, m, mask=i < Tq)
    tl.store(lse + Tq + i, tl.log2(total), mask=i < Tq)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """gptfast::attention. lse has each row's largest score and log2 of its sum of weights."""
    B, H, Tq, D = q.shape
    out, lse = q.new_empty(B, Tq, H, D), q.new_empty(B, H, 2, Tq, dtype=torch.float32)
    if lse.numel():
        grid = lambda meta: (cdiv(Tq, meta["BM"]) * B * H,)  # noqa: E731
        shape: dict[str, Any] = {**parts_of(q), "TILES": row_tiles(k, v)}
        rows = forward_kernel.chosen({"q": q, **shape})["BN"]
        forward_kernel[grid](
            q, k, v, out, lse, *descriptors(shape["TILES"], rows, k, v),
            H, Tq, k.shape[2], log2_scale(scale),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], Tq * H * D, D, H * D,
            **dropout_args(dropout_p, seed, stream, q.device), **shape,
            PRECISION=precision(q.dtype),
        )  # fmt: skip
    return out, lse
