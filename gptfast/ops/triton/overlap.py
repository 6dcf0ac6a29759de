"""Kernels that start while the one before them ends: CUDA's programmatic dependent launch.

A kernel of a decode step takes a few microseconds, and its start, its first loads and its end are a
large part of them. So the next kernel may start when this one says so, and loads weights before it
waits.

Before `wait_for_predecessor`, which every program calls, a kernel reads nothing but weights, which
no kernel of a step writes, and writes nothing. The wait ends when the predecessor has ended and
what it wrote is visible. The predecessor had waited for its own, and so on: when a kernel goes on,
all before it have ended, as without early starts. So it may overwrite what any of them read.

Weights that have just been written are visible too: between their kernels and a step run the
kernels that give sequences their slots, which let nothing start early.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gptfast.ops.triton.launch import copies_tiles


@triton.jit
def let_successor_start(OVERLAP: tl.constexpr, NOW: tl.constexpr):
    """Lets the next kernel start once all programs have come here, if OVERLAP says NOW."""
    if OVERLAP == NOW:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """Waits until all kernels before have ended."""
    if OVERLAP is not None:
        gdc_wait()


def overlap(rows: int) -> dict[str, Any]:
    """Returns arguments of a kernel with the parameter OVERLAP, without overlap on other chips.

    With few rows, programs of several kernels fit on the GPU at once and load weights meanwhile.
    With many rows, the GPU would place early programs wherever a multiprocessor happens to have
    space, not where they run fastest.

    Args:
        rows: The rows of the decode step.
    """
    if not copies_tiles():  # the same chips have both, NVIDIA's from Hopper on
        return {"OVERLAP": None}
    return {"OVERLAP": "at start" if rows <= 16 else "at end", "launch_pdl": True}
