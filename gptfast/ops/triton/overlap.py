"""Kernels that start while the kernel before them ends: CUDA's programmatic dependent launch.

A chain of kernels of 2 us each loses about 1 us between two of them. A kernel with OVERLAP lets its
successor start at once, and waits for its predecessor before it reads or writes anything that
another kernel writes; so every kernel of a chain that has it must call `wait_for_predecessor`.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gptfast.ops.triton.launch import INTERPRETED

ENABLED = True  # where the device has it


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """Lets the next kernel of the stream start, and waits until the one before has ended."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(pointers):
    """Fetches the lines at these addresses into the L2 cache (CUDA)."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, False, 1
    )


def overlap() -> dict[str, Any]:
    """Returns the arguments of a kernel that has the parameter OVERLAP, for this device."""
    return {"OVERLAP": True, "launch_pdl": True} if ENABLED and _supported() else {"OVERLAP": False}


def _supported() -> bool:
    if INTERPRETED:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90
