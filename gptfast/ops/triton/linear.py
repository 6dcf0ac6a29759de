"""Linear layers, fused with bias, GELU, dropout and residual; what their backwards share.

A product with something around it is one persistent kernel: as many programs as the device has
multiprocessors take tile after tile, and while one tile is finished the operands of the next are on
their way. Tensor descriptors (Hopper's TMA) read the operands where the rule of `described` allows,
pointers elsewhere. Products with nothing around them are torch's (`matmul`).

Letters: M rows of an activation (all leading dimensions), K its columns, N columns of the result.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gptfast.ops.triton.launch import (
    INTERPRETED,
    or_absent,
    precision,
    processors,
    wants,
)
from gptfast.ops.triton.matmul import matmul
from gptfast.ops.triton.rows import NO_DROPOUT, Sums, column_sums, layer_norm, norm_backward
from gptfast.ops.triton.tiles import (
    dropout_factors,
    gelu,
    halves,
    load_tile,
    product,
    store_tile,
    tile_at,
)

GROUP = 8  # rows of tiles that are computed together; see tiles.tile_at


class Tile(NamedTuple):
    """A configuration of a product's kernel.

    K is summed in blocks of BK one after the other, and BK is the same in all tiles for a dtype, so
    a row has the same bits whichever is chosen.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    part: int  # columns of the tile that are finished at a time, so that registers suffice
    cost: float  # time per element of the tile, relative to that of the fastest


# With descriptors: 2-byte elements.
DESCRIBED_TILES = (
    Tile(128, 256, 64, 8, 3, 64, 1.0),
    Tile(128, 128, 64, 4, 4, 32, 1.08),
    Tile(64, 64, 64, 4, 4, 64, 1.8),
)
# With pointers, by bytes per element.
POINTER_TILES = {
    2: (Tile(128, 128, 32, 8, 3, 64, 1.0), Tile(64, 64, 32, 4, 3, 64, 1.6)),
    4: (Tile(64, 64, 32, 8, 2, 64, 1.0),),
}


def choose_tile(tiles: tuple[Tile, ...], M: int, N: int, at_once: int) -> Tile:
    """Returns the tile with which `at_once` processors need the least time for an (M, N) result."""

    def time(tile: Tile) -> float:
        rounds = triton.cdiv(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN), at_once)
        return rounds * tile.BM * tile.BN * tile.cost

    return min(tiles, key=time)


def has_descriptors(dtype: torch.dtype) -> bool:
    """Whether products of this dtype read their operands by tensor descriptors, if aligned.

    They do on NVIDIA's chips from Hopper on, and in the interpreter. float32 is split in registers.
    """
    if dtype.itemsize != 2 or INTERPRETED:
        return dtype.itemsize == 2
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 90)


def described(a: Tensor, b: Tensor) -> str | None:
    """Returns how tensor descriptors read the operands a (M, K) and b (K, N); None if they cannot.

    "rows" if the rows of b are contiguous, "columns" if its columns are. A descriptor's rows start
    at multiples of 16 bytes. The rule looks at K, N, strides and dtype alone, never at M.
    """
    if not has_descriptors(a.dtype):
        return None
    (K, N), size = b.shape, a.dtype.itemsize
    if K * size % 16:
        return None
    if b.stride(0) == 1 and b.stride(1) == K:
        return "columns"
    return "rows" if b.stride() == (N, 1) and N * size % 16 == 0 else None


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """Describes a contiguous matrix by blocks of rows x columns; copies it if misaligned."""
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


AROUND = 0


def around(x: Any, how: dict[str, Any], least: int = 1) -> Any:
    if x is None or how["AROUND"] < least:
        return x
    return descriptor(x.view(-1, x.shape[-1]), how["BM"], min(how["BN"], how["PART"]))


class Operands(NamedTuple):
    """What the kernels of products get: operands a and b and how they are read, tile and grid."""

    args: tuple[Any, ...]
    how: dict[str, Any]  # constants and launch options
    grid: tuple[int]


def operands(a: Tensor, b: Tensor) -> Operands:
    """Prepares the product of a (M, K), contiguous, and b (K, N) of a's dtype, neither empty."""
    (M, K), N = a.shape, b.shape[1]
    how, at_once = described(a, b), processors(a.device)
    tiles = POINTER_TILES[a.element_size()] if how is None else DESCRIBED_TILES
    tile = choose_tile(tiles, M, N, at_once)
    strides = b.stride()
    if how is not None:
        a = descriptor(a, tile.BM, tile.BK)
        b = (
            descriptor(b, tile.BK, tile.BN)
            if how == "rows"
            else descriptor(b.t(), tile.BN, tile.BK)
        )
    constants = {
        "AROUND": AROUND if how is not None and N % 8 == 0 else 0, "DESCRIBED": how, "PRECISION": precision(), "GROUP": GROUP, "BM": tile.BM, "BN": tile.BN,
        "BK": tile.BK, "PART": tile.part, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    count = triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN)
    return Operands((a, b, M, N, K, *strides), constants, (min(count, at_once),))


@triton.jit(do_not_specialize=["M", "substream", "threshold"])
def linear_kernel(
    a, b, M, N, K, b_row, b_column, y, before, bias, residual,
    seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr, AROUND: tl.constexpr,
):  # fmt: skip
    """Y = residual + dropout(gelu(A B + bias)); everything but A B is optional.

    `before`, if given, receives the input of GELU.
    """
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    done = tl.program_id(0)  # a second count: loads of the next tile need not wait for its end
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m0, n0 = tile_at(tile, M, N, BM, BN, GROUP)
        acc = product(a, b, m0, n0, M, N, K, b_row, b_column, DESCRIBED, PRECISION, BM, BN, BK)
        m0, n0 = tile_at(done, M, N, BM, BN, GROUP)
        done += tl.num_programs(0)
        _finish(
            acc, m0, n0, M, N, y, before, bias, residual,
            seed, substream, threshold, keep_scale, GELU, BM, BN, PART, AROUND,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, m0, n0, M, N, y, before, bias, residual, seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, AROUND: tl.constexpr,
):  # fmt: skip
    """What `linear_kernel` does to a tile of A B, PART columns at a time."""
    if COLUMNS > PART:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = halves(acc, ROWS, COLUMNS)
        _finish(
            left, m0, n0, M, N, y, before, bias, residual,
            seed, substream, threshold, keep_scale, GELU, ROWS, HALF, PART, AROUND,
        )  # fmt: skip
        _finish(
            right, m0, n0 + HALF, M, N, y, before, bias, residual,
            seed, substream, threshold, keep_scale, GELU, ROWS, HALF, PART, AROUND,
        )  # fmt: skip
    else:
        _finish_part(
            acc, m0, n0, M, N, y, before, bias, residual,
            seed, substream, threshold, keep_scale, GELU, ROWS, COLUMNS, AROUND,
        )  # fmt: skip


@triton.jit
def _finish_part(
    acc, m0, n0, M, N, y, before, bias, residual, seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AROUND: tl.constexpr,
):  # fmt: skip
    if bias is not None:
        n = n0 + tl.arange(0, COLUMNS)
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if before is not None:
        store_tile(before, acc, m0, n0, M, N, AROUND > 0, ROWS, COLUMNS)
    if GELU is not None:
        acc = gelu(acc, GELU)
    if seed is not None:
        acc *= dropout_factors(
            tl.load(seed), substream, 0, m0, n0, threshold, keep_scale, ROWS, COLUMNS
        )
    if residual is not None:
        acc += load_tile(residual, m0, n0, M, N, AROUND > 1, ROWS, COLUMNS)
    store_tile(y, acc, m0, n0, M, N, AROUND > 0, ROWS, COLUMNS)


def multiply(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, gelu: str | None = None,
    before: Tensor | None = None, dropout: dict[str, Any] = NO_DROPOUT,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes residual + dropout(gelu(a b + bias)); see `linear_kernel`.

    Args:
        a: (..., K), contiguous.
        b: (K, N), any strides and dtype; converted to a's dtype.
        bias: (N,).
        gelu: "erf", "tanh", or None for no GELU.
        before: (..., N), receives the input of GELU.
        dropout: What `dropout_args` returns.
        residual: (..., N), contiguous.

    Returns:
        (..., N) in a's dtype.
    """
    y = a.new_empty(*a.shape[:-1], b.shape[1])
    if y.numel():
        these = operands(a.view(-1, a.shape[-1]), b.to(a.dtype))
        linear_kernel[these.grid](
            *these.args,
            around(y, these.how),
            around(before, these.how),
            bias,
            around(residual, these.how, 2),
            **dropout,
            GELU=gelu,
            **these.how,
        )
    return y


def weight_grad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Computes the gradient of a linear layer's weight, dW = dY' X, in the weight's dtype.

    dy (..., N) and x (..., K) are contiguous and of one dtype.
    """
    dtype = weight.dtype if weight.dtype in (dy.dtype, torch.float32) else dy.dtype
    return matmul(dy.flatten(0, -2).t(), x.flatten(0, -2), dtype).to(weight.dtype)


def input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """Computes the gradient of a linear layer's input, dX = dY W, (..., K) in dy's dtype."""
    dx = matmul(dy.flatten(0, -2), weight.to(dy.dtype))
    return dx.view(*dy.shape[:-1], weight.shape[1])


def linear(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear."""
    n = x = x.contiguous()
    mean = rstd = None
    if ln_w is not None:
        n, mean, rstd = layer_norm(x, ln_w, ln_b)
    residual = None if residual is None else residual.contiguous()
    y = multiply(n, weight.t(), bias=bias, residual=residual)
    return y, *or_absent(x, mean, rstd)


def linear_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, mean: Tensor,
    rstd: Tensor, weight: Tensor, bias: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_backward."""
    x, dy, sums = x.contiguous(), dy.contiguous(), Sums()
    n, dx = x, x.new_empty(0)
    dln_w = dln_b = dweight = dbias = None
    if wants(wanted, 0, 2):
        dx = input_grad(dy, weight)
        if ln_w is not None:
            back = norm_backward(dx, x, None, mean, rstd, ln_w, ln_b, wants(wanted, 3))
            dx, n = back.dx, back.n
            dln_w, dln_b = sums.of_norm(back, ln_w, ln_b, wanted)
    elif ln_w is not None and wants(wanted, 3):
        n, _, _ = layer_norm(x, ln_w, ln_b)
    if wants(wanted, 3):
        dweight = weight_grad(dy, n, weight)
    if bias is not None and wants(wanted, 4):
        dbias = sums.of(column_sums(dy), bias)
    sums.add()
    return dx, *or_absent(x, dln_w, dln_b, dweight, dbias)
