"""The machine that a run is trained on: its card, and the fastest product that it reaches."""

import functools
import importlib.metadata
import math
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptfast import threads
from gptfast.config import GPTConfig, Precision
from gptfast.ops import select

PEAK_SECONDS = 0.3
SIZES = {"cpu": (1024, 512, 512), "cuda": (4096, 4096, 4096)}  # M, K, N of the product


def card(device: torch.device, precision: Precision) -> dict[str, Any]:
    """Describes the machine, its software and its speed.

    Args:
        device: Where the run is trained.
        precision: The run's precision.

    Returns:
        `processor`, `gpu` (None without), `cores` (those that the process may use at once),
        `threads` (torch's), `instruction_set` (None without the compiled kernels), `gptfast`,
        `torch`, `python`, `device`, `precision` and `peak_gflops` (see `peak`).
    """
    gpu = device.type == "cuda"
    extension = select.extension()
    limits = threads.limits()
    quota = limits.affinity if limits.quota is None else limits.quota
    return {
        "processor": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "cores": max(1, int(min(limits.affinity, quota))),
        "threads": limits.torch,
        "instruction_set": None if extension is None else extension.isa_current(),
        "gptfast": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "precision": precision,
        "peak_gflops": round(peak(device, precision), 1),
    }


def version() -> str:
    """Returns the version of the package; "not installed" for a tree that is not."""
    try:
        return importlib.metadata.version("gptfast-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Returns the processor's name as the system reports it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def peak(device: torch.device, precision: Precision) -> float:
    """Returns the GFLOP/s of the fastest matrix product, by torch or, on a CPU, by the kernels.

    It is measured for PEAK_SECONDS, once in a process for each device, dtype, number of threads and
    instruction set.
    """
    extension = select.extension()
    level = None if extension is None else extension.isa_current()
    return _peak(device, precision, torch.get_num_threads(), level)


@functools.cache
def _peak(device: torch.device, precision: Precision, threads: int, level: str | None) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    M, K, N = SIZES.get(device.type, SIZES["cpu"])
    # Values of their own pattern: the global random numbers stay as they were.
    x, weight = (
        torch.arange(rows * K, device=device).remainder(251).sub(125).div(125).to(dtype).view(-1, K)
        for rows in (M, N)
    )
    products: list[Callable[[], Any]] = [lambda: torch.mm(x, weight.t())]
    # (On a GPU such products are torch's, see gptfast.ops.triton.matmul.)
    if device.type == "cpu" and not select.unavailable("cpu", dtype):
        products.append(lambda: torch.ops.gptfast.linear(x, None, None, weight, None, None))
    until, best = time.perf_counter() + PEAK_SECONDS, math.inf
    with torch.inference_mode():
        for product in products:
            _seconds(product, device)  # the first call of each makes threads, buffers, kernels
        while True:
            best = min(best, *(_seconds(product, device) for product in products))
            if time.perf_counter() > until:
                return 2e-9 * M * K * N / best


def _seconds(product: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    product()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def flops_per_token(model: GPTConfig) -> float:
    """Returns the useful FLOPs of training on one token of a full window.

    They are 3 times the forward pass's: its matrix products and the unmasked half of attention. A
    multiply-add counts as two. What is computed again to save memory does not count.
    """
    C, T = model.n_embd, model.block_size
    per_layer = 2 * 12 * C * C + 2 * C * (T + 1) if model.attention else 2 * 8 * C * C
    return 3.0 * (model.n_layer * per_layer + 2 * C * model.vocab_size)
