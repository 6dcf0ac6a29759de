"""Linear layers of few rows, as decoding needs them: fixed tiles, nothing tuned.

A step of decoding multiplies few rows by every weight, so kernel latency and weight bandwidth
dominate. Each warp sums its own slice of K: short chains of matrix
instructions instead of a long one. The slices' sums are added in a fixed order at the end.

Weights of 8 bits are integers until they are in registers, where every dtype has them exactly; the
sums are multiplied by the scales of their columns.

A row has the same bits for any number of rows: how K is cut depends on K alone, and every tile uses
the same matrix instruction (mma.sync on NVIDIA: three-dimensional tiles never become wgmma).

Letters: M rows, K columns (summed over by the product), N columns of a result; S slots, C n_embd,
H heads, D head_dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.int8 import Int8Weight
from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.ops.triton.few_rows_tile import Tile, tile_of
from gptfast.ops.triton.launch import cdiv, kernel, precision
from gptfast.ops.triton.overlap import (
    let_successor_start,
    overlap,
    wait_for_predecessor,
)
from gptfast.ops.triton.tiles import gelu

BLOCK = 128  # columns of x at once for LayerNorm's statistics; a thread has 16 bytes of them
NORM_ROWS = 4  # rows of a program of one warp


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


@triton.jit
def _vector(vector, k, K):
    """Elements k of a vector of K, 0 outside."""
    return tl.load(vector + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _normal(a, mean, rstd, scale, shift):
    """LayerNorm of elements, whose means, scales and so on have the same shape."""
    normal = (a.to(tl.float32) - mean) * rstd * scale
    if shift is not None:
        normal += shift
    return normal.to(a.dtype)


@triton.jit
def _places(m, M, tokens, lengths, capacity):
    """The tokens of the rows and their positions in the window, where they are needed."""
    token, place = m.to(tl.int64), m.to(tl.int64)
    if lengths is not None:
        place = tl.minimum(tl.load(lengths + m, mask=m < M, other=1), capacity) - 1
    if tokens is not None:
        token = tl.load(tokens + m, mask=m < M, other=0)
    return token, place


@kernel
@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x, ln_w, ln_b, y, M, eps, tokens, wte, wpe, lengths, capacity,
    K: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(x) for BM rows, with the bits of `few_rows_kernel`'s own.

    With `wte`, x is the sum of two embeddings, and written.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row = m.to(tl.int64)
    let_successor_start(OVERLAP, "at start")
    wait_for_predecessor(OVERLAP)
    token, place = _places(m, M, tokens, lengths, capacity)
    mean, rstd = _moments(x, wte, wpe, row, token, place, m < M, eps, True, K, BM, BLOCK)
    for k0 in tl.static_range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)[None, :]
        inside = (m < M)[:, None] & (k < K)
        tile = _columns(x, wte, wpe, row[:, None], token[:, None], place[:, None], k, inside, K)
        shift = None
        if ln_b is not None:
            shift = _vector(ln_b, k, K)
        tile = _normal(tile, mean[:, None], rstd[:, None], _vector(ln_w, k, K), shift)
        tl.store(y + row[:, None] * K + k, tile, mask=inside)
    let_successor_start(OVERLAP, "at end")


@triton.jit
def _sliced(k0, LENGTH: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr):
    """Columns k0 to k0 + BK of every slice of K, (SLICES, BK)."""
    return (tl.arange(0, SLICES) * LENGTH + k0)[:, None] + tl.arange(0, BK)[None, :]


@triton.jit
def _weights(weight, n, k, N, K):
    """Columns k (SLICES, BK) of the weight's rows n, as right-hand operands (SLICES, BK, BN)."""
    at = weight + n.to(tl.int64)[None, None, :] * K + k[:, :, None]
    return tl.load(at, mask=(n < N)[None, None, :] & (k < K)[:, :, None], other=0.0)


@triton.jit
def _activations(x, wte, wpe, m, token, place, k, M, K):
    """Columns k (SLICES, BK) of rows m, as left-hand operands (SLICES, BM, BK)."""
    own, row = k[:, None, :], m.to(tl.int64)[None, :, None]
    inside = (m < M)[None, :, None] & (own < K)
    return _columns(x, wte, wpe, row, token[None, :, None], place[None, :, None], own, inside, K)


@triton.jit
def _sum_of_slices(acc, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Sums acc (SLICES, BM, BN) over the slices, in pairs; each slice belongs to a warp.

    tl.sum would exchange numbers between warps one by one.
    """
    pairs = tl.permute(tl.reshape(acc, (2, SLICES // 2, BM, BN)), (1, 2, 3, 0))
    first, second = tl.split(pairs)
    if SLICES == 2:
        total = tl.reshape(first + second, (BM, BN))
    else:
        total = _sum_of_slices(first + second, SLICES // 2, BM, BN)
    return total


@kernel
@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x, weight, weight_scale, bias, ln_w, ln_b, residual, y, M, N, y_row, eps,
    tokens, wte, wpe, lengths, capacity, cache, drawn, limits,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK: tl.constexpr, SLICES: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
    NORM_LEAST: tl.constexpr,
):  # fmt: skip
    """A tile of y = f(LayerNorm(x) weight' + bias) + residual, each part of it optional.

    With `weight_scale`, the weight has integers; row n of them is multiplied by weight_scale[n].
    With `wte`, x is the sum of two embeddings, which the programs of the first columns also write
    to x. With `cache`, the N = 3 H D columns are queries, keys and values: y receives the queries,
    the cache the others. AT_ONCE, all operands are loaded before the first product, the weights
    even before the predecessor has ended; else they are loaded some steps ahead.
    """
    let_successor_start(OVERLAP, "at start")
    row_blocks = tl.cdiv(M, BM)
    m0, n0 = tl.program_id(0) % row_blocks * BM, tl.program_id(0) // row_blocks * BN
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    row = m.to(tl.int64)
    factor, offset = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    if weight_scale is not None:
        factor = tl.load(weight_scale + n, mask=n < N, other=0.0)
    if bias is not None:
        offset = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    left, right, scales, shifts = (), (), (), ()
    if AT_ONCE:
        for k0 in tl.static_range(0, LENGTH, BK):
            k = _sliced(k0, LENGTH, BK, SLICES)
            right = right + (_weights(weight, n, k, N, K),)  # type: ignore[assignment]
            if ln_w is not None:
                scales = scales + (_vector(ln_w, k, K)[:, None, :],)  # type: ignore[assignment]
            if ln_b is not None:
                shifts = shifts + (_vector(ln_b, k, K)[:, None, :],)  # type: ignore[assignment]
    wait_for_predecessor(OVERLAP)
    token, place = _places(m, M, tokens, lengths, capacity)
    # The epilogue's operands come from the L2 cache as well, so they are loaded now.
    inside = (m < M)[:, None] & (n < N)[None, :]
    old, runs = tl.zeros([BM, BN], tl.float32), m < M
    if residual is not None:
        at = row[:, None] * N + n[None, :]
        old = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if cache is not None:
        runs &= tl.load(lengths + m, mask=m < M, other=1) <= capacity
        count = tl.load(drawn + m, mask=m < M, other=0)
        runs &= count < tl.load(limits + m, mask=m < M, other=0)
    if AT_ONCE:
        for k0 in tl.static_range(0, LENGTH, BK):
            k = _sliced(k0, LENGTH, BK, SLICES)
            a = _activations(x, wte, wpe, m, token, place, k, M, K)
            left = left + (a,)  # type: ignore[assignment]
    mean, rstd = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if ln_w is not None:
        # Two rows per warp, as in norm_kernel: fewer would be summed in another order.
        ROWS: tl.constexpr = max(BM, NORM_LEAST)
        i = m0 + tl.arange(0, ROWS)
        own_token, own_place = token, place
        if ROWS > BM:
            own_token, own_place = _places(i, M, tokens, lengths, capacity)
        mean, rstd = _moments(
            x, wte, wpe, i.to(tl.int64), own_token, own_place, i < M, eps, n0 == 0, K, ROWS, BLOCK
        )
        if ROWS > BM:
            own = i[:, None] == m[None, :]
            mean = tl.sum(tl.where(own, mean[:, None], 0.0), 0)
            rstd = tl.sum(tl.where(own, rstd[:, None], 0.0), 0)
    acc = tl.zeros([SLICES, BM, BN], tl.float32)
    if AT_ONCE:
        operands = ()
        for i in tl.static_range(LENGTH // BK):
            a = left[i]
            if ln_w is not None:
                shift = None  # type: ignore[var-annotated]
                if ln_b is not None:
                    shift = shifts[i]
                a = _normal(a, mean[None, :, None], rstd[None, :, None], scales[i], shift)
            operands = operands + (a,)  # type: ignore[assignment]
        for i in tl.static_range(LENGTH // BK):  # own loop: all operands share a barrier
            b = right[i].to(operands[i].dtype)  # type: ignore[var-annotated]
            acc = tl.dot(operands[i], b, acc, input_precision=PRECISION)
    else:
        for k0 in tl.range(0, LENGTH, BK):
            k = _sliced(k0, LENGTH, BK, SLICES)
            a = _activations(x, wte, wpe, m, token, place, k, M, K)
            if ln_w is not None:
                shift = None
                if ln_b is not None:
                    shift = _vector(ln_b, k, K)[:, None, :]
                scale = _vector(ln_w, k, K)[:, None, :]
                a = _normal(a, mean[None, :, None], rstd[None, :, None], scale, shift)
            b = _weights(weight, n, k, N, K).to(a.dtype)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    let_successor_start(OVERLAP, "at end")
    out = _sum_of_slices(acc, SLICES, BM, BN)
    if weight_scale is not None:
        out *= factor[None, :]
    if bias is not None:
        out += offset[None, :]
    if GELU is not None:
        out = gelu(out, GELU)
    if residual is not None:
        out += old
    at = row[:, None] * y_row + n[None, :]
    out = out.to(y.dtype.element_ty)
    if cache is None:
        tl.store(y + at, out, mask=inside)
    else:
        C: tl.constexpr = H * D
        kind, column = n // C, n % C  # 0 queries, 1 keys, 2 values
        tl.store(y + at, out, mask=inside & (n < C)[None, :])
        head = (row[:, None] * 2 + kind[None, :] - 1) * H + (column // D)[None, :]
        at = (head * capacity + place[:, None]) * D + (column % D)[None, :]
        tl.store(cache + at, out, mask=inside & (n >= C)[None, :] & runs[:, None])


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
    tile = tile or tile_of(M, N, K, x.element_size(), scale is not None)
    tokens, wte, wpe = (None, None, None) if embedding is None else (
        embedding.tokens, embedding.wte, embedding.wpe
    )  # fmt: skip
    lengths, capacity, heads, head_dim, cache = None, 0, 1, 1, None
    if append is not None:
        lengths, cache = append.lengths, append.cache
        _, _, heads, capacity, head_dim = cache.shape
    elif embedding is not None:
        lengths, capacity = embedding.lengths, embedding.capacity
    # Embeddings of another dtype, float32's beside weights of 8 bits, would take many registers.
    apart = tile.BM > 16 or (wte is not None and wte.dtype != x.dtype)
    if norm is not None and apart:
        normal = torch.empty_like(x)
        norm_kernel[(cdiv(M, NORM_ROWS),)](
            x, *norm, normal, M, LAYER_NORM_EPS, tokens, wte, wpe, lengths, capacity,
            K=K, BM=NORM_ROWS, BLOCK=BLOCK, **overlap(M), num_warps=1,
        )  # fmt: skip
        x, norm, tokens, wte, wpe = normal, None, None, None, None
    grid = (cdiv(M, tile.BM) * cdiv(N, tile.BN),)
    few_rows_kernel[grid](
        x, weight, scale, bias, *(norm or (None, None)), residual, y, M, N, y.stride(0),
        LAYER_NORM_EPS,
        tokens, wte, wpe, lengths, capacity, cache,
        None if append is None else append.drawn, None if append is None else append.limits,
        K=K, H=heads, D=head_dim, GELU=gelu, PRECISION=precision(x.dtype), **tile._asdict(),
        BLOCK=BLOCK, NORM_LEAST=2 * tile.num_warps, **overlap(M),
    )  # fmt: skip
