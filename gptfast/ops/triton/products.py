"""How the kernels of products read their operands, and which tiles they compute.

Such a kernel is persistent: its programs loop over tiles, and load the operands of the next tile
while they finish one. Tensor descriptors (Hopper's TMA) read the operands where the rule of
`described` allows, pointers elsewhere.

Letters: M rows, N columns of the result; K is summed over.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.ops.triton import launch
from gptfast.ops.triton.launch import (
    INTERPRETED,
    cdiv,
    copies_tiles,
    descriptor,
    precision,
    processors,
)

GROUP = 8  # rows of tiles that are computed together; see tiles.tile_at
REGISTERS = 65536  # of a multiprocessor, on all of NVIDIA's chips


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
    parts: int  # 1, 2 or 4, into which its columns are split after the product; see tiles.parts_of
    programs: int  # per multiprocessor: one finishes its tile while another multiplies
    cost: float  # time per element of the tile, relative to the fastest tile


# With descriptors: 2-byte elements. The second has more threads for what follows the product.
DESCRIBED_TILES = (Tile(128, 128, 64, 4, 3, 4, 2, 1.0), Tile(64, 64, 64, 4, 3, 1, 3, 1.8))
EPILOGUE_TILES = (Tile(128, 128, 64, 8, 3, 4, 2, 1.0), Tile(64, 64, 64, 4, 3, 2, 3, 1.8))
# With pointers, by bytes per element.
POINTER_TILES = {
    2: (Tile(128, 128, 32, 8, 3, 4, 1, 1.0), Tile(64, 64, 32, 4, 3, 1, 3, 1.6)),
    4: (Tile(64, 64, 32, 8, 2, 1, 2, 1.0),),
}


def fitting(tiles: tuple[Tile, ...], itemsize: int, shared: int) -> tuple[Tile, ...]:
    """Returns the tiles for which `shared` bytes of shared memory suffice; at least the last."""

    def needs(tile: Tile) -> int:
        operands = tile.stages * (tile.BM + tile.BN) * tile.BK * itemsize
        return operands + tile.BM * tile.BN * 4  # `tiles.parts_of` moves the sums on AMD's chips

    return tuple(tile for tile in tiles if needs(tile) <= shared) or tiles[-1:]


@functools.lru_cache(1024)
def choose_tile(
    tiles: tuple[Tile, ...], M: int, N: int, itemsize: int, processors: int, shared: int
) -> Tile:
    """Returns the tile with which a device needs the least time for an (M, N) result.

    Args:
        tiles: The candidates; the last fits every device.
        M: Rows of the result.
        N: Columns of the result.
        itemsize: Bytes per element of the operands.
        processors: The device's multiprocessors.
        shared: Bytes of shared memory that a program may have.
    """

    def time(tile: Tile) -> float:
        count = cdiv(M, tile.BM) * cdiv(N, tile.BN)
        return cdiv(count, processors) * tile.BM * tile.BN * tile.cost

    return min(fitting(tiles, itemsize, shared), key=time)


def has_descriptors(dtype: torch.dtype) -> bool:
    """Whether products of this dtype read their operands by tensor descriptors, if aligned.

    They do on NVIDIA's chips from Hopper on, and in the interpreter. float32 is split in registers.
    """
    if dtype.itemsize != 2 or INTERPRETED:
        return dtype.itemsize == 2
    return copies_tiles()


def described(a: Tensor, b: Tensor) -> str | None:
    """Returns how tensor descriptors read the operands a (M, K) and b (K, N); None if they cannot.

    "rows" if the rows of b are contiguous, "columns" if its columns are. A descriptor's rows start
    at multiples of 16 bytes. The rule depends on K, N, strides and dtype alone, never on M.
    """
    (K, N), size = b.shape, a.dtype.itemsize
    if not has_descriptors(a.dtype) or K * size % 16:
        return None
    if b.stride() == (1, K):
        return "columns"
    return "rows" if b.stride() == (N, 1) and N * size % 16 == 0 else None


class Product(NamedTuple):
    """A product of a kernel: how it reads the operands, and its tile.

    Attributes:
        operands: The kernel's first arguments: a, b, M, N, K, and the strides of b.
        options: Its constants, and options of the launch.
        grid: The number of programs.
    """

    operands: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int]

    def result(self, y: Tensor | None) -> Any:
        """Returns what the kernel gets for a result y (.., N), contiguous: see tiles.store_tile."""
        if y is None or not self.options["STORED"]:
            return y
        columns = self.options["BN"] // self.options["PARTS"]
        return descriptor(y.view(-1, y.shape[-1]), self.options["BM"], columns)


def product(a: Tensor, b: Tensor, tiles: tuple[Tile, ...] = DESCRIBED_TILES) -> Product:
    """Prepares the product of a (M, K), contiguous, and b (K, N) of a's dtype, neither empty.

    If descriptors read the operands, the tile is one of `tiles`.
    """
    (M, K), N = a.shape, b.shape[1]
    how, count, strides = described(a, b), processors(a.device), b.stride()
    tiles = POINTER_TILES[a.element_size()] if how is None else tiles
    tile = choose_tile(tiles, M, N, a.element_size(), count, launch.shared_limit())
    options = {
        "DESCRIBED": how, "STORED": how is not None and N * a.element_size() % 16 == 0,
        "PRECISION": precision(a.dtype), "GROUP": GROUP,
        "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "PARTS": tile.parts,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if how is not None:
        a = descriptor(_aligned(a), tile.BM, tile.BK)
        block = (tile.BK, tile.BN) if how == "rows" else (tile.BN, tile.BK)
        b = descriptor(_aligned(b if how == "rows" else b.t()), *block)
        most = REGISTERS // (32 * tile.warps * tile.programs) // 8 * 8
        if most < 255:  # the most that a thread can have
            options["maxnreg"] = most
    blocks = cdiv(M, tile.BM) * cdiv(N, tile.BN)
    return Product((a, b, M, N, K, *strides), options, (min(blocks, count * tile.programs),))


def _aligned(x: Tensor) -> Tensor:
    """Returns x, or a copy if it does not start at a multiple of 16 bytes as descriptors must."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
