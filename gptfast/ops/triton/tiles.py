"""Device functions that the kernels share: a tile of a product, of dropout factors, and GELU.

Letters: M rows of an activation, K its columns (summed over by a product), N columns of a result.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
DROPOUT_ROWS = tl.constexpr(8)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox-4x32-10 of counters (uint32) as `tl.philox` computes it, in half as many products.

    A product of 64 bits is one instruction; its two halves are two.
    """
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    a, b = tl.full([], 0xD2511F53, tl.uint64), tl.full([], 0xCD9E8D57, tl.uint64)
    for _ in tl.static_range(10):
        x, y = c0.to(tl.uint64) * a, c2.to(tl.uint64) * b
        c0, c1 = (y >> 32).to(tl.uint32) ^ c1 ^ k0, y.to(tl.uint32)
        c2, c3 = (x >> 32).to(tl.uint32) ^ c3 ^ k1, x.to(tl.uint32)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def dropout_kept(
    seed, substream, matrix, i0, j0, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Whether dropout keeps an element, for rows from i0 and columns from j0; see ops.random.

    (ROWS, COLUMNS), or (COLUMNS, ROWS) if TRANSPOSED. i0 and ROWS must be multiples of 8: a Philox
    block has 16 bits for each of 8 rows of a column.
    """
    GROUPS: tl.constexpr = ROWS // DROPOUT_ROWS
    group = (tl.arange(0, GROUPS) + i0 // DROPOUT_ROWS)[:, None]
    none = tl.zeros([GROUPS, COLUMNS], tl.int32)
    c0 = (none + (tl.arange(0, COLUMNS) + j0)[None, :]).to(tl.uint32)
    c1 = (none + group).to(tl.uint32)
    c2 = (none + matrix).to(tl.uint32)
    c3 = (none + substream).to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, c0, c1, c2, c3)
    # One word with a bit per row is cheap to give to the threads that need it.
    dropped = none
    dropped = _append_dropped(dropped, w3, threshold)
    dropped = _append_dropped(dropped, w2, threshold)
    dropped = _append_dropped(dropped, w1, threshold)
    dropped = _append_dropped(dropped, w0, threshold)
    # Several threads of a matrix product need the same word. The compiler would let each of them
    # compute Philox anew, rather than exchange words; it moves nothing across a reduction.
    dropped = tl.sum(dropped[:, :, None], 2)
    bit = 1 << tl.arange(0, DROPOUT_ROWS)
    if TRANSPOSED:
        dropped = tl.reshape(tl.trans(dropped)[:, :, None] & bit[None, None, :], (COLUMNS, ROWS))
    else:
        dropped = tl.reshape(dropped[:, None, :] & bit[None, :, None], (ROWS, COLUMNS))
    return dropped == 0


@triton.jit
def _append_dropped(bits, word, threshold):
    """Appends a bit for the higher and one for the lower half of a word: whether it is too low."""
    high = (word >> 16).to(tl.int32) - threshold
    low = (word & 0xFFFF).to(tl.int32) - threshold
    bits = bits << 1 | (high >> 31 & 1)
    return bits << 1 | (low >> 31 & 1)


@triton.jit
def dropout_factors(
    seed, substream, matrix, i0, j0, threshold, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The factors of `dropout_kept`: `scale`, or 0 for what is dropped."""
    kept = dropout_kept(seed, substream, matrix, i0, j0, threshold, ROWS, COLUMNS)
    return tl.where(kept, scale, 0.0)


@triton.jit
def gelu(u, GELU: tl.constexpr):
    """GELU: u Phi(u), or its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415)."""
    if GELU == "erf":
        value = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    else:  # (1 + tanh x) / 2 = sigmoid(2 x)
        value = u * tl.sigmoid(1.5957691216057308 * u * (1.0 + 0.044715 * u * u))
    return value


@triton.jit
def gelu_slope(u, GELU: tl.constexpr):
    """The derivative of `gelu`."""
    if GELU == "erf":
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
        slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density
    else:
        cubic = 0.044715 * u * u
        s = tl.sigmoid(1.5957691216057308 * u * (1.0 + cubic))
        slope = s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * cubic)
    return slope


@triton.jit
def normalized(x, mean, rstd, weight, bias, k, inside):
    """Columns k of LayerNorm(x), x (rows, columns) in float32; columns not `inside` are 0."""
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * w[None, :]
    if bias is not None:
        y += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def own_tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column indices of this program's tile of an (M, N) matrix, and the first of each.

    Programs are ordered by groups of GROUP rows of tiles, column by column within a group, so that
    concurrent programs share operand tiles in the L2 cache.
    """
    columns = tl.cdiv(N, BN)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inner = tl.program_id(0) % (GROUP * columns)
    m0, n0 = (first + inner % height) * BM, inner // height * BN
    return m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), m0, n0


@triton.jit
def own_head(H, T, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's head, the head's indices b and h, and the first of its BLOCK rows."""
    blocks = tl.cdiv(T, BLOCK)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return head, (head // H).to(tl.int64), (head % H).to(tl.int64), block * BLOCK


@triton.jit
def product(
    a, b, mean, rstd, ln_w, ln_b, m, n, M, N, K, b_row, b_column,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows m and columns n of A B, or of LayerNorm(A) B if `mean` is given, in float32.

    A (M, K) is contiguous; element (k, n) of B has the offset k b_row + n b_column. Rows from M on
    wrap around, columns from N on are 0.
    """
    row = (m % M).to(tl.int64)
    if mean is not None:
        row_mean, row_rstd = tl.load(mean + row), tl.load(rstd + row)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        if mean is not None:
            y = normalized(x.to(tl.float32), row_mean, row_rstd, ln_w, ln_b, k, k < K)
            x = y.to(x.dtype)
        w = tl.load(
            b + k.to(tl.int64)[:, None] * b_row + n.to(tl.int64)[None, :] * b_column,
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc
