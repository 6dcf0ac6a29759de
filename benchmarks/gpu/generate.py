"""Greedy generation, against a static cache with a captured step, and other loops in torch.

Rows with one model follow each other, which is made once.
"""

import functools
from collections.abc import Callable, Iterator

import bench_generate
from bench_generate import Shape
from common import OURS, Case, Row, Run

TIMING = "calls"
MEMORY = False  # caches are kept from call to call
SHAPES = (
    *(Shape("S", bench_generate.S, 4, 60, batch) for batch in (1, 64, 1024)),
    *(Shape("S", bench_generate.S, 64, 32, batch, past=True) for batch in (1, 64)),
    *(Shape("M", bench_generate.M, 16, 128, batch) for batch in (1, 64, 512)),
    *(Shape("L", bench_generate.L, 32, 64, batch) for batch in (1, 64)),
)
# Peers that --full adds; past the window "SDPA loop" is the only one, and remains.
SLOW = ("course", "course fp32", "transformers", "SDPA, cache")


def case(shape: Shape, dtype: str, full: bool) -> Case:
    """Makes the case of one model and batch; the rate is in tokens/s."""
    slow = SLOW if shape.past else (*SLOW, "SDPA loop")
    found = bench_generate.step(shape, dtype, () if full else slow)
    found.flops = 0.0
    tokens = shape.tokens
    found.details = lambda seconds: {"tokens/s": tokens / seconds}
    return found


def rows(full: bool) -> Iterator[Row]:
    """Yields the rows."""
    for shape in SHAPES:
        for dtype in ("bf16", "fp32", "int8") if full else ("bf16",):
            name = f"{shape}, int8" if dtype == "int8" else str(shape)
            alone: dict[str, Callable[[], Run]] = {
                OURS: functools.partial(bench_generate.ours, shape, dtype)
            }
            kind = "bf16" if dtype == "int8" else dtype
            build = functools.partial(case, shape, dtype, full)
            yield Row(name, kind, build, alone=alone)
