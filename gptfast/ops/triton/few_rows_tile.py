"""The tile of a product of few rows: chosen by a rule, never timed. See few_rows.py."""

from typing import NamedTuple

from gptfast.ops.triton import launch
from gptfast.ops.triton.launch import INTERPRETED, block_of, cdiv, copies_tiles

UNIT = 32  # a slice's length is a multiple of it
SMALL = 1 << 20  # elements of a weight that many small tiles read from the L2 cache
SIZES = (64, 32), (32, 32), (32, 16), (16, 16)  # rows and columns of a tile
VOCABULARY_SIZES = (64, 64), *SIZES  # for N >= 8192; these take most registers
PROGRAMS = 120  # enough for every multiprocessor; the largest tile that makes as many is taken
AT_ONCE_BYTES = 80 * 1024  # of a program's operands, which need not be loaded step by step
STAGE_BYTES = 32 * 1024  # of operands per stage otherwise


class Tile(NamedTuple):
    """Sizes of a tile. A row's bits depend on LENGTH, SLICES and, in float32, BK."""

    BM: int
    BN: int
    BK: int
    LENGTH: int  # of a slice of K
    SLICES: int
    AT_ONCE: bool
    num_warps: int  # a multiple of SLICES
    num_stages: int


def tile_of(M: int, N: int, K: int, itemsize: int, few_bits: bool = False) -> Tile:
    """Returns the tile for M rows; what the bits depend on follows from K and the dtype alone."""
    slices = 4 if K <= 1024 else 8
    length = cdiv(K, slices * UNIT) * UNIT
    early, at_once = copies_tiles(), False  # whether kernels can start early
    if M > 16 and (M > 128 or N * K > SMALL):
        sizes = SIZES if N < 8192 else VOCABULARY_SIZES
        enough = (each for each in sizes if cdiv(M, each[0]) * cdiv(N, each[1]) >= PROGRAMS)
        rows, columns = next(enough, SIZES[-1])
        if itemsize == 4:  # float32 operands take three times as many registers
            rows, columns = min(rows, 32), min(columns, 32)
    else:
        rows, columns = 16, 32 if N >= 8192 else 8 if K > 1024 and early else 16
        alone = 1 if M == 1 else 16
        at_once = early and (alone + columns) * K * itemsize <= AT_ONCE_BYTES * 2 // itemsize
        rows = alone if at_once else 16
    if INTERPRETED:  # the interpreter's time grows with the number of programs
        columns = 128
    both = (rows + columns) * itemsize
    # In 2-byte dtypes BK is free: the sum goes on 16 columns at a time in any case.
    deepest = UNIT if itemsize == 4 else min(128, block_of(STAGE_BYTES // (both * slices) + 1) // 2)
    if few_bits:  # their order of sums repeats every 32 columns
        deepest = max(deepest, UNIT)
    depth = min(length & -length, deepest)
    stages = 3  # of which all but one wait in shared memory
    while stages > 1 and (stages - 1) * slices * depth * both > launch.shared_limit():
        stages -= 1
    return Tile(rows, columns, depth, length, slices, at_once, slices, stages)
