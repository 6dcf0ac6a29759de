"""Linear layers of few rows, as decoding needs them: fixed tiles, nothing tuned, LayerNorm inside.

A step of decoding multiplies few rows by every weight, so it is the latency of a kernel and the
bytes of the weights that count. Each warp sums its own quarter of K: four short chains of matrix
instructions instead of a long one. The quarters are added at the end.

Weights of 8 bits are integers until they are in registers, where every dtype has them exactly; the
sums are multiplied by the scales of their columns.

A row has the same bits for any number of rows: how K is cut depends on K alone, and every tile uses
the same matrix instruction (mma.sync on NVIDIA: three-dimensional tiles never become wgmma).

Letters: M rows, K columns (summed over by the product), N columns of a result; S slots, C n_embd,
H heads, D head_dim.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.int8 import Int8Weight
from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.ops.triton import launch
from gptfast.ops.triton.launch import INTERPRETED, block_of, cdiv, kernel, precision
from gptfast.ops.triton.tiles import gelu

SLICES = 4  # parts of K, one per warp
UNIT = 32  # a part's length is a multiple of it
SMALL = 1 << 20  # elements of a weight
BLOCK = 128  # columns of x at once for LayerNorm's statistics


class Embedding(NamedTuple):
    """Where rows come from in the first layer: x_m = wte[tokens_m] + wpe[lengths_m - 1]."""

    tokens: Tensor  # (S,) int64
    lengths: Tensor  # (S,) int64; those past `capacity` count as `capacity`
    wte: Tensor  # (V, C)
    wpe: Tensor  # (T, C)
    capacity: int


class Append(NamedTuple):
    """Where keys and values of new tokens go: to position lengths_m - 1 of slot m."""

    cache: Tensor  # (S, 2, H, capacity, D), contiguous
    lengths: Tensor  # (S,) int64, of the windows with the new token
    drawn: Tensor  # (S,) int64
    limits: Tensor  # (S,) int64; nothing is written for slots with drawn >= limits


@triton.jit
def _columns(x, wte, wpe, row, token, place, k, inside, K):
    """Columns k of the rows: from x, or the sum of two embeddings, rounded to x's dtype."""
    if wte is None:
        found = tl.load(x + row * K + k, mask=inside, other=0.0)
    else:
        found = tl.load(wte + token * K + k, mask=inside, other=0.0).to(tl.float32)
        found += tl.load(wpe + place * K + k, mask=inside, other=0.0).to(tl.float32)
        found = found.to(x.dtype.element_ty)
    return found


@triton.jit
def _moments(
    x, wte, wpe, row, token, place, known, eps, writes,
    K: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of the rows; a program that `writes` keeps embeddings."""
    sums = tl.zeros([BM, BLOCK], tl.float32)
    for k0 in tl.static_range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)[None, :]
        inside = known[:, None] & (k < K)
        tile = _columns(x, wte, wpe, row[:, None], token[:, None], place[:, None], k, inside, K)
        if wte is not None:
            if writes:
                tl.store(x + row[:, None] * K + k, tile, mask=inside)
        sums += tile.to(tl.float32)
    mean = tl.sum(sums, 1) / K
    sums = tl.zeros([BM, BLOCK], tl.float32)
    for k0 in tl.static_range(0, K, BLOCK):  # the rows are in the L1 cache now
        k = k0 + tl.arange(0, BLOCK)[None, :]
        inside = known[:, None] & (k < K)
        tile = _columns(x, wte, wpe, row[:, None], token[:, None], place[:, None], k, inside, K)
        rest = tl.where(inside, tile.to(tl.float32) - mean[:, None], 0.0)
        sums += rest * rest
    return mean, 1.0 / tl.sqrt(tl.sum(sums, 1) / K + eps)


@kernel
@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x, weight, weight_scale, bias, ln_w, ln_b, residual, y, M, N, y_row, eps,
    tokens, wte, wpe, lengths, capacity, cache, drawn, limits,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A tile of y = f(LayerNorm(x) weight' + bias) + residual, each part of it optional.

    With `weight_scale`, the weight has integers, of which row n is multiplied by weight_scale[n].
    With `wte`, x is the sum of two embeddings, which the programs of the first columns also write
    to x. With `cache`, the N = 3 H D columns are queries, keys and values: y receives the queries,
    the cache the others.
    """
    row_blocks = tl.cdiv(M, BM)
    m0, n0 = tl.program_id(0) % row_blocks * BM, tl.program_id(0) // row_blocks * BN
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    row, token, place = m.to(tl.int64), m.to(tl.int64), m.to(tl.int64)
    if lengths is not None:
        place = tl.minimum(tl.load(lengths + m, mask=m < M, other=1), capacity) - 1
    if wte is not None:
        token = tl.load(tokens + m, mask=m < M, other=0)
    mean, rstd = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if ln_w is not None:
        mean, rstd = _moments(x, wte, wpe, row, token, place, m < M, eps, n0 == 0, K, BM, BLOCK)
    acc = tl.zeros([SLICES, BM, BN], tl.float32)
    for k0 in tl.range(0, LENGTH, BK):
        part = tl.arange(0, SLICES) * LENGTH + k0
        k = part[:, None] + tl.arange(0, BK)[None, :]  # (SLICES, BK)
        own = k[:, None, :]
        inside = (m < M)[None, :, None] & (own < K)
        a = _columns(
            x, wte, wpe, row[None, :, None], token[None, :, None], place[None, :, None], own,
            inside, K,
        )  # fmt: skip
        if ln_w is not None:
            g = tl.load(ln_w + k, mask=k < K, other=0.0).to(tl.float32)
            normal = (a.to(tl.float32) - mean[None, :, None]) * rstd[None, :, None] * g[:, None, :]
            if ln_b is not None:
                shift = tl.load(ln_b + k, mask=k < K, other=0.0).to(tl.float32)
                normal += shift[:, None, :]
            a = normal.to(a.dtype)
        b = tl.load(
            weight + n.to(tl.int64)[None, None, :] * K + k[:, :, None],
            mask=(n < N)[None, None, :] & (k < K)[:, :, None],
            other=0.0,
        )
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    out = tl.sum(acc, 0)
    if weight_scale is not None:
        out *= tl.load(weight_scale + n, mask=n < N, other=0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU is not None:
        out = gelu(out, GELU)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = row[:, None] * N + n[None, :]
    if residual is not None:
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if cache is None:
        at = row[:, None] * y_row + n[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    else:
        C: tl.constexpr = H * D
        kind, column = n // C, n % C  # 0 queries, 1 keys, 2 values
        out = out.to(y.dtype.element_ty)
        tl.store(y + row[:, None] * y_row + n[None, :], out, mask=inside & (n < C)[None, :])
        length = tl.load(lengths + m, mask=m < M, other=1)
        runs = tl.load(drawn + m, mask=m < M, other=0) < tl.load(limits + m, mask=m < M, other=0)
        runs &= length <= capacity
        head = (row[:, None] * 2 + kind[None, :] - 1) * H + (column // D)[None, :]
        at = (head * capacity + place[:, None]) * D + (column % D)[None, :]
        tl.store(cache + at, out, mask=inside & (n >= C)[None, :] & runs[:, None])


class Tile(NamedTuple):
    """Sizes of a tile. A row's bits depend on LENGTH, BLOCK and, in float32, BK."""

    BM: int
    BN: int
    BK: int
    LENGTH: int  # of a part of K
    BLOCK: int  # columns of x at once
    num_stages: int


def tile_of(M: int, N: int, K: int, itemsize: int, embeds: int = 0) -> Tile:
    """Returns the tile for M rows; what the bits depend on follows from K and the dtype alone.

    embeds is the number of bytes per element of the embeddings that are summed, if any.
    """
    length = cdiv(K, SLICES * UNIT) * UNIT
    divisor = length & -length  # the largest power of 2 that divides it
    wide = itemsize == 4
    small = N * K <= SMALL  # many small tiles read such a weight again and again, from the L2 cache
    if M <= 16 or (M <= 128 and small) or embeds == 4:
        rows, columns = 16, 16
    else:
        rows, columns = (32, 32) if M <= 128 or wide or embeds else (64, 32)
    if N >= 8192:  # a vocabulary: enough columns for every multiprocessor
        columns = 32 if rows == 64 or (wide and rows == 32) else 64
    if INTERPRETED:  # whose time is that of the number of programs
        columns = 128
    # In 2-byte dtypes BK is free: the sum goes on 16 columns at a time in any case (with weights of
    # 8 bits in an order of its own, which repeats every 32).
    deepest = 32 if wide or rows == 64 else 128 if rows == 16 and columns == 16 else 64
    block = min(BLOCK, block_of(K))
    stages = 3 if launch.shared_limit() > launch.MIN_SHARED else 1  # of up to 33 KB
    return Tile(rows, columns, min(divisor, deepest), length, block, stages)


def few_rows_linear(
    x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None, y: Tensor, *,
    norm: tuple[Tensor, Tensor | None] | None = None, gelu: str | None = None,
    residual: Tensor | None = None, embedding: Embedding | None = None,
    append: Append | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Computes y = gelu(LayerNorm(x) weight' + bias) + residual; what is not given is left out.

    Args:
        x: (M, K), contiguous. With `embedding` (which needs `norm`), it receives the embeddings.
        weight: (N, K), contiguous, in x's dtype or of 8 bits.
        bias: (N,).
        y: (M, N), any stride between rows, in x's dtype or float32; (M, N / 3) with `append`. It
            may be `residual`, but not x.
        norm: Weight (K,) and bias (K,) of the LayerNorm.
        gelu: "erf" or "tanh".
        residual: (M, N), contiguous.
        embedding: Makes x.
        append: Where keys and values go, if the layer makes queries, keys and values.
        tile: Replaces the choice of `tile_of`, for measurements.
    """
    weight, scale = weight if isinstance(weight, Int8Weight) else (weight, None)
    (M, K), N = x.shape, weight.shape[0]
    embeds = 0 if embedding is None else embedding.wte.element_size()
    tile = tile or tile_of(M, N, K, x.element_size(), embeds)
    tokens, wte, wpe = (None, None, None) if embedding is None else (
        embedding.tokens, embedding.wte, embedding.wpe
    )  # fmt: skip
    lengths, capacity, heads, head_dim, cache = None, 0, 1, 1, None
    if append is not None:
        lengths, cache = append.lengths, append.cache
        _, _, heads, capacity, head_dim = cache.shape
    elif embedding is not None:
        lengths, capacity = embedding.lengths, embedding.capacity
    grid = (cdiv(M, tile.BM) * cdiv(N, tile.BN),)
    few_rows_kernel[grid](
        x, weight, scale, bias, *(norm or (None, None)), residual, y, M, N, y.stride(0),
        LAYER_NORM_EPS,
        tokens, wte, wpe, lengths, capacity, cache,
        None if append is None else append.drawn, None if append is None else append.limits,
        K=K, H=heads, D=head_dim, GELU=gelu, PRECISION=precision(x.dtype), **tile._asdict(),
        SLICES=SLICES, num_warps=SLICES,
    )  # fmt: skip
