"""Kernels that start while the one before them ends: CUDA's programmatic dependent launch.

A kernel of a decode step takes a few microseconds, of which its start, its first loads and its end
are a large part. So the next kernel may start when this one says so, and loads weights before it
waits.

Before `wait_for_predecessor`, which every program calls, a kernel reads nothing but weights, which
no kernel of a step writes, and writes nothing. The wait ends when the predecessor has ended and
what it wrote is visible. The predecessor had waited for its own, and so on: when a kernel goes on,
all before it have ended, as without early starts. So it may overwrite what any of them read.

Weights that have just been written are visible too: between them and a step are kernels that let
nothing start early, those that give sequences their slots.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gptfast.ops.triton.launch import copies_tiles

AT_START, AT_END = "at start", "at end"


@triton.jit
def let_successor_start(OVERLAP: tl.constexpr, NOW: tl.constexpr):
    """Lets the next kernel start, if that is to happen NOW, when all programs have come here."""
    if OVERLAP == NOW:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """Waits until all kernels before have ended."""
    if OVERLAP is not None:
        gdc_wait()


@triton.jit
def fetch_to_l2(start, size, OVERLAP: tl.constexpr):
    """Has `size` bytes (a multiple of 16) from `start` on fetched to the L2 cache by all programs.

    It is a hint: nothing waits for it.
    """
    if OVERLAP is not None:
        share = tl.cdiv(size, tl.num_programs(0) * 128) * 128
        first = tl.program_id(0) * share
        own = tl.minimum(share, size - first)
        if own > 0:
            at = (start.to(tl.int64, bitcast=True) + first) & -16
            tl.inline_asm_elementwise(
                """{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""",
                "=r,l,r", [at, own], tl.int32, False, 1,
            )  # fmt: skip


def overlap(when: str | None) -> dict[str, Any]:
    """Returns arguments of a kernel with the parameter OVERLAP, without overlap on other chips.

    Args:
        when: When the next kernel may start, if that has overlap, too.
    """
    if when is None or not copies_tiles():  # the same chips have both, NVIDIA's from Hopper on
        return {"OVERLAP": None}
    return {"OVERLAP": when, "launch_pdl": True}


def when(rows: int) -> str:
    """Returns when the kernel after one of a decode step of so many rows may start.

    Few rows leave room for the programs of several kernels, which load weights meanwhile. Programs
    of many rows would be put where there is room by chance, and not where they run fastest.
    """
    return AT_START if rows <= 16 else AT_END
