"""The time of each kernel in training steps and in generated tokens."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import bench_generate
import torch
from bench_train import our_step
from common import Row
from torch.profiler import ProfilerActivity, profile

from gpu import generate, train
from gpu.measure import DEVICE, emit, reason

STEPS, WARM_UPS = 3, 5
MOST = 40  # kernels of a table


def kernels_of(step: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
    """Returns name, calls and ms per step of the kernels of `step`, the longest first."""
    for _ in range(WARM_UPS):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        {"name": each.key[:100], "calls": each.count / steps, "ms": ms / steps / 1e3}
        for each in found.key_averages()
        if (ms := each.self_device_time_total) > 0
    ]
    return sorted(kernels, key=lambda each: -each["ms"])


def steps() -> Iterator[tuple[str, Callable[[], Callable[[], Any]], int]]:
    """Yields name, a builder and the number of steps per call of what is profiled."""
    for shape in train.SHAPES:
        if shape.name in ("gpt2", "shakespeare"):
            build = functools.partial(our_step, shape, "bf16")
            yield f"training step, {shape.name} {shape.batch}x{shape.model.block_size}", build, 1
    for text in generate.SHAPES:
        ours = functools.partial(bench_generate.ours, text, "bf16")
        yield f"generated token, {text}", ours, text.new


def main() -> None:
    """Emits a table per step."""
    for name, build, per_call in steps():
        try:
            with torch.device(DEVICE):
                step = build()
            kernels = kernels_of(step, STEPS)
        except Exception as error:
            emit({"name": name, "dtype": "bf16", "failed": reason(error)})
            continue
        for each in kernels:
            each["calls"], each["ms"] = each["calls"] / per_call, each["ms"] / per_call
        total, launches = sum(each["ms"] for each in kernels), sum(e["calls"] for e in kernels)
        table = {"kernels": kernels[:MOST], "total_ms": total, "launches": launches}
        emit({"name": name, "dtype": "bf16"} | table)


def rows(full: bool) -> Iterator[Row]:
    """Yields nothing: what is profiled has been compiled for other sections."""
    return iter(())
