"""Verifies and times rows on a GPU, and says each result at once.

A section is a module with `rows(full)`, which yields `common.Row`s whose case is built with the GPU
as torch's default device, and optionally `TIMING` and `MEMORY`. TIMING "kernels" (the default)
takes the median of CUDA events around single calls, with a cold L2 cache; "calls" that of the wall
clock around several calls in a row, which is what a user waits for. MEMORY is whether the peak of
allocated memory means anything. A case without contenders has them in its row's `alone`: they are
made one after the other, each with all of the memory.
"""

import gc
import json
import statistics
import time
from typing import Any

import torch
from command import drop_contenders_that_fail
from common import OURS, Case, Row, Run, drop_contenders_that_err

from gpu.report import MARK

DEVICE = "cuda"
POISON_BYTES = 2 << 30
SECONDS = 0.4  # to time a contender of "calls" for, in groups of at most MAX_CALLS
GROUPS, MAX_CALLS = 5, 50
# Calls before a contender is timed; after these a step is a CUDA graph. A slow one has two.
WARM_CALLS, SLOW_SECONDS = 5, 0.5
KERNEL_MS = 40  # to time a contender of "kernels" for, after half of it to warm up
MIB = 2**20


def emit(row: dict[str, Any]) -> None:
    """Says a result in a line that the driver reads."""
    print(f"{MARK}{json.dumps(row)}", flush=True)


def run(module: Any, full: bool, only: str = "") -> None:
    """Measures a section's rows with `only` in the name; one that fails does not stop others."""
    timing, memory = getattr(module, "TIMING", "kernels"), getattr(module, "MEMORY", True)
    gc.freeze()  # what has been imported need not be looked through in every row
    for row in (each for each in module.rows(full) if only in each.name):
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        torch.manual_seed(0)
        line: dict[str, Any] = {"name": row.name, "dtype": row.dtype}
        try:
            emit(line | measure(row, timing, memory, full))
        except Exception as error:
            emit(line | {"failed": reason(error)})
            if isinstance(error, torch.AcceleratorError):
                raise  # nothing runs on the device after an illegal access


def reason(error: BaseException) -> str:
    """Returns an error in one line."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) > 20 else " ".join(lines[:3])
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def measure(row: Row, timing: str, memory: bool, full: bool) -> dict[str, Any]:
    """Builds, verifies and times one row; a gptfast that is wrong is timed, too, and says so."""
    clock = [time.perf_counter()]
    with torch.device(DEVICE):
        case = row.build()
        for name in () if full else case.compiles:
            del case.contenders[name]
    notes = drop_contenders_that_fail(case)  # without a default device, as a user has it
    wrong = {}
    with torch.device(DEVICE):
        poison()
        try:
            notes |= drop_contenders_that_err(case)
        except AssertionError as error:
            wrong["failed"] = reason(error)
    clock.append(time.perf_counter())
    timed = {"kernels": kernel_seconds, "calls": call_seconds}[timing]
    seconds, peaks = {}, {}
    for name in [each for each in case.contenders or row.alone if each not in notes]:
        before = torch.cuda.memory_allocated()
        try:
            contender = contender_of(row, case, name)
            if memory:
                peaks[name] = peak_mib(contender, before)
            seconds[name] = timed(contender)
            del contender
        except Exception as error:
            if name == OURS or isinstance(error, torch.AcceleratorError):
                raise
            notes[name] = f"does not run: {reason(error)}"
        gc.collect()
    clock.append(time.perf_counter())
    took = {"verifying": clock[1] - clock[0], "timing": clock[2] - clock[1]}
    return wrong | line_of(case, seconds, peaks, notes) | {"took_s": took}


def contender_of(row: Row, case: Case, name: str) -> Run:
    """Returns a contender of a case, or makes it."""
    if case.contenders:
        return case.contenders[name]
    with torch.device(DEVICE):
        return row.alone[name]()


def line_of(
    case: Case, seconds: dict[str, float], peaks: dict[str, float], notes: dict[str, str]
) -> dict[str, Any]:
    """Returns the numbers of a row: see `gpu_check.py`."""
    others = {name: s for name, s in seconds.items() if name != OURS}
    alike = {name: s for name, s in others.items() if name not in case.other_dtype}
    best = min(alike, key=alike.__getitem__) if alike else None
    found = {
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "best": best,
        "ratio": others[best] / seconds[OURS] if best else None,
        "errors": case.errors,
        "notes": notes,
    }
    if peaks:
        found["peak_mib"] = peaks
    if case.flops:
        found["tflops"] = 1e-12 * case.flops / seconds[OURS]
    if case.details:
        found["details"] = case.details(seconds[OURS])
        found["details_of_best"] = case.details(seconds[best]) if best else {}
    return found


def poison() -> None:
    """Fills memory that torch will give out with NaN, so that what is not written shows."""
    blocks = [torch.full((POISON_BYTES // 8,), torch.nan, device=DEVICE) for _ in range(2)]
    small = [torch.full((n,), torch.nan, device=DEVICE) for n in (64, 4096, 2**18) * 20]
    del blocks, small


def peak_mib(contender: Run, before: int) -> float:
    """Returns by how much the allocated memory exceeds `before` bytes at its peak in some calls."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for i in range(WARM_CALLS):
        contender()
        torch.cuda.synchronize()
        if i > 0 and time.perf_counter() - start > SLOW_SECONDS:
            break
    return (torch.cuda.max_memory_allocated() - before) / MIB


def kernel_seconds(contender: Run) -> float:
    """Returns the median of CUDA events around a call."""
    from triton.testing import do_bench

    ms = do_bench(contender, warmup=KERNEL_MS // 2, rep=KERNEL_MS, return_mode="median")
    return 1e-3 * ms


def call_seconds(contender: Run) -> float:
    """Returns the median over groups of calls of the wall clock per call, of a warm contender."""
    start = time.perf_counter()
    contender()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    each = max(1, min(MAX_CALLS, int(SECONDS / once / GROUPS)))
    times = [once] if each == 1 else []
    while len(times) < GROUPS and sum(times) < SECONDS:
        start = time.perf_counter()
        for _ in range(each):
            contender()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / each)
    return statistics.median(times)
