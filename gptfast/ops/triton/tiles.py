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
def dropped_rows(
    seed, substream, matrix, i0, j0, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The dropout mask of rows from i0 and columns from j0, 8 rows to an integer: bit r of element
    (g, j), (ROWS / 8, COLUMNS), says whether row 8 g + r is dropped; see ops.random.

    i0 and ROWS must be multiples of 8: a Philox block has 16 bits for each of 8 rows of a column.
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
    return tl.sum(dropped[:, :, None], 2)


@triton.jit
def kept_of(dropped, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Whether an element is kept, (ROWS, COLUMNS), or (COLUMNS, ROWS) if TRANSPOSED, by
    `dropped_rows`."""
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
    """The factors of dropout, (ROWS, COLUMNS): `scale`, or 0 for what is dropped."""
    dropped = dropped_rows(seed, substream, matrix, i0, j0, threshold, ROWS, COLUMNS)
    return tl.where(kept_of(dropped, ROWS, COLUMNS), scale, 0.0)


@triton.jit
def gelu(u, GELU: tl.constexpr):
    """GELU: u Phi(u), or its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415)."""
    if GELU == "erf":
        gate, _ = _normal(u)
    else:
        gate, _ = _logistic(u)
    return u * gate


@triton.jit
def gelu_and_slope(u, GELU: tl.constexpr):
    """`gelu` and its derivative."""
    if GELU == "erf":
        gate, density = _normal(u)
        value = u * gate
        slope = gate + u * density
    else:
        gate, rest = _logistic(u)
        value = u * gate
        slope = gate + value * rest * (1.5957691216057308 + 0.2140644488178007 * u * u)
    return value, slope


@triton.jit
def tile_at(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of the tile-th tile of an (M, N) matrix.

    Tiles are ordered by groups of GROUP rows of tiles, column by column within a group, so that
    concurrent programs share operand tiles in the L2 cache.
    """
    columns = tl.cdiv(N, BN)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inner = tile % (GROUP * columns)
    return (first + inner % height) * BM, inner // height * BN


@triton.jit
def _reciprocal(x):
    """1 / x for x from 1 on: a root, and a step of Newton's. A division takes longer."""
    root = tl.rsqrt(x)
    first = root * root
    return first * (2.0 - x * first)


@triton.jit
def own_head(H, T, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, first_head=0):
    """This program's head, the head's indices b and h, and the first of its BLOCK rows.

    The first program's head is `first_head`.
    """
    blocks = tl.cdiv(T, BLOCK)
    head, block = first_head + tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return head, (head // H).to(tl.int64), (head % H).to(tl.int64), block * BLOCK


@triton.jit
def _logistic(u):
    """g = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2 = 1 / (1 + 2^(-u (c1 + c3 u^2))); 1 - g.

    The smaller of the two is a product, because a difference would lose digits, and the derivative
    magnifies that error.
    """
    power = tl.exp2(-tl.abs(u) * (2.302208198 + 0.1029432397 * u * u))
    larger = _reciprocal(1.0 + power)
    smaller = power * larger
    return tl.where(u < 0.0, smaller, larger), tl.where(u < 0.0, larger, smaller)


@triton.jit
def product(
    a, b, m0, n0, M, N, K, b_row, b_column, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The tile of A B from row m0 and column n0 on, in float32; columns from N on are 0.

    DESCRIBED says that a and b are tensor descriptors: "rows" if b describes B (K, N), "columns"
    if it describes the transpose; rows from M on are 0. If None, a and b are pointers, A (M, K) is
    contiguous, element (k, n) of B has the offset k b_row + n b_column, and rows from M on repeat
    the first ones.
    """
    acc = tl.zeros([BM, BN], tl.float32)
    if DESCRIBED is not None:
        for k0 in tl.range(0, K, BK):
            x = a.load([m0, k0])
            if DESCRIBED == "rows":
                w = b.load([k0, n0])
            else:
                w = b.load([n0, k0]).T
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    else:
        row = ((m0 + tl.arange(0, BM)) % M).to(tl.int64)[:, None]
        n = n0 + tl.arange(0, BN)
        column = n.to(tl.int64)[None, :]
        for k0 in tl.range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            x = tl.load(a + row * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            w = tl.load(
                b + k.to(tl.int64)[:, None] * b_row + column * b_column,
                mask=(k < K)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def parts_of(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The tile, or the halves or quarters of its columns from left to right.

    Finishing one after the other takes fewer registers. On NVIDIA's chips the split moves none.
    """
    if PARTS == 1:
        parts = (tile,)
    elif PARTS == 2:
        parts = _halves(tile, ROWS, COLUMNS)
    else:
        left, right = _halves(tile, ROWS, COLUMNS)
        first, second = _halves(left, ROWS, COLUMNS // 2)
        third, fourth = _halves(right, ROWS, COLUMNS // 2)
        parts = (first, second, third, fourth)  # type: ignore[assignment]
    return parts


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def store_tile(
    to, value, m0, n0, M, N, DESCRIBED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Stores a tile of an (M, N) matrix, which `to` describes or, contiguous, points to."""
    if DESCRIBED:
        to.store([m0, n0], value.to(to.dtype))
    else:
        m, n = m0 + tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS)
        at = to + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, value.to(to.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def load_tile(source, m0, n0, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a contiguous (M, N) matrix, 0 outside; None of None."""
    if source is None:
        tile = None
    else:
        m, n = m0 + tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS)
        at = source + m.to(tl.int64)[:, None] * N + n[None, :]
        tile = tl.load(at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
    return tile


@triton.jit
def _normal(u):
    """Phi(u), the normal distribution, and its density, by one exponential for both.

    Phi(-|u|) = t P(t) exp(-u^2 / 2) with t = 1 / (1 + 0.28 |u|), the form of Hastings' erf
    (Abramowitz and Stegun 7.1.26); P was fitted by least squares, to an error of 2e-8. An epilogue
    is bound by its instructions, and tl.erf takes twice as many.
    """
    t = _reciprocal(1.0 + 0.28 * tl.minimum(tl.abs(u), 1e18))  # an infinite one would give NaN
    power = tl.exp2(-0.7213475204444817 * u * u)
    p = 0.38987116 - 0.10580753 * t
    p = p * t - 0.23698896
    p = p * t + 0.26890661
    p = p * t + 0.06749814
    p = p * t + 0.11652056
    tail = p * t * power
    return tl.where(u < 0.0, tail, 1.0 - tail), 0.3989422804014327 * power
