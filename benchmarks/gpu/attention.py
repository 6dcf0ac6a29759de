"""Causal attention at two shapes, forward and with gradients, against SDPA's backends."""

import functools
from collections.abc import Iterator

from bench_attention import MODES, attention
from common import Row

SHAPES = ((16, 12, 1024, 64), (4, 16, 4096, 128))
FULL_SHAPES = ((64, 2, 64, 64), (16, 6, 256, 64), (4, 8, 1024, 32), (2, 4, 4096, 256))


def rows(full: bool) -> Iterator[Row]:
    """Yields the rows; letters are those of bench_attention.py."""
    for shape in (*SHAPES, *(FULL_SHAPES if full else ())):
        for mode in MODES:
            name = f"{'x'.join(map(str, shape))} {mode}"
            for dtype in ("bf16", "fp32") if full else ("bf16",):
                yield Row(name, dtype, functools.partial(attention, shape, mode, dtype))
