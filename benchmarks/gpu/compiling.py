"""Compiles the kernels of rows by several processes, into Triton's cache on disk.

Each process first calls gptfast's contenders of its rows without launching anything: what would be
launched is compiled by threads, each kernel by the one process that claims it first. Nothing is
captured meanwhile: a graph would be empty, and captures were seen to fail while the threads held
tensors of earlier steps. When all are compiled, the process calls the contenders in earnest, for
what depends on results.
"""

import contextlib
import gc
import hashlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import OURS, Row
from torch import Tensor

from gptfast.ops.triton import launch
from gpu.measure import DEVICE, WARM_CALLS, reason

THREADS = 3
OFTEN = 100  # launches of a kernel after which a call is seen to wait for results
DRY_SECONDS = 15
ALL_DONE_SECONDS = 45.0


class Enough(Exception):
    """Ends a call without launches that would go on for ever."""


class Claims:
    """Which kernels have been claimed and compiled, as files in a folder of all processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, key: str) -> Path | None:
        """Returns the file to rename when the kernel is compiled; None if another has it."""
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.claimed"
        if path.with_suffix(".done").exists():
            return None
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
        return None

    def wait(self) -> None:
        """Waits until nothing that was claimed is still being compiled."""
        end = time.monotonic() + ALL_DONE_SECONDS
        while time.monotonic() < end and any(self.folder.glob("*.claimed")):
            time.sleep(0.1)


def described(kernel: Any, whole: dict[str, Any]) -> str:
    """Returns what a kernel is compiled for: of numbers that are not constants, very little."""
    numbers = {each.name for each in kernel.function.params if not each.is_constexpr}

    def of(name: str, x: Any) -> str:
        if isinstance(x, Tensor):
            return f"{x.dtype} {x.data_ptr() % 16}"
        if name in numbers and isinstance(x, int) and not isinstance(x, bool):
            return f"{x == 1} {x % 16} {x >> 31}"
        if name in numbers and isinstance(x, float):
            return "float"
        if hasattr(x, "base"):  # a tensor descriptor
            return f"{x.base.dtype} {x.block_shape}"
        return str(x)

    return " ".join([kernel.name, *(f"{name}={of(name, x)}" for name, x in whole.items())])


class NoGraph:
    """Stands for a CUDA graph: what would be captured is called, and not again."""

    def replay(self) -> None:
        """Does nothing."""


@contextlib.contextmanager
def no_capture(*_: Any, **__: Any) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    yield


@contextlib.contextmanager
def compiling(claims: Claims) -> Iterator[None]:
    """Compiles, in threads, what would be launched; waits for them at the end."""
    calls: Counter[str] = Counter()
    with ThreadPoolExecutor(THREADS) as pool:

        def compile_one(kernel: Any, whole: dict[str, Any], claimed: Path) -> None:
            try:
                kernel.function.run(grid=None, warmup=True, **whole)
            except Exception as error:
                print(f"{kernel.name}: failed: {reason(error)}", file=sys.stderr, flush=True)
            claimed.rename(claimed.with_suffix(".done"))

        def watch(kernel: Any, args: launch.Args) -> bool:
            whole = {**args, **kernel.chosen(args)}
            key = described(kernel, whole)
            calls[key] += 1
            if calls[key] > OFTEN:
                raise Enough
            claimed = claims.claim(key) if calls[key] == 1 else None
            if claimed is not None:
                pool.submit(compile_one, kernel, whole, claimed)
            return False

        with (
            launch.watched(watch),
            mock.patch.object(torch.cuda, "CUDAGraph", NoGraph),
            mock.patch.object(torch.cuda, "graph", no_capture),
        ):
            yield


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises Enough in what takes longer."""

    def stop(*_: Any) -> None:
        raise Enough

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def contender(row: Row) -> Any:
    """Makes gptfast's contender of a row."""
    with torch.device(DEVICE):
        return row.alone[OURS]() if row.alone else row.build().contenders[OURS]


def verify(row: Row) -> None:
    """Calls what verifies a row."""
    with torch.device(DEVICE):
        row.build().verify()


def call(row: Row) -> None:
    """Calls gptfast's contender as often as it takes until it is a CUDA graph."""
    run = contender(row)
    for _ in range(WARM_CALLS if row.alone else 1):
        run()
    torch.cuda.synchronize()


def fill_cache(rows: list[Row], folder: Path, forget: Any) -> None:
    """Compiles what these rows need.

    Args:
        rows: The rows of this process.
        folder: See `Claims`.
        forget: Forgets the models that rows share, which hold what was recorded without launches.
    """
    claims = Claims(folder)
    with compiling(claims):
        for row in rows:
            # Without launches results are undefined, and a loop may wait for one for ever.
            with contextlib.suppress(Exception), at_most(DRY_SECONDS):
                call(row)
            if len(row.alone) > 1:  # whose verification computes without dropout
                with contextlib.suppress(Exception), at_most(DRY_SECONDS):
                    verify(row)
            tidy(forget)
    claims.wait()
    for row in rows:
        try:
            call(row)
        except Exception as error:
            print(f"{row}: failed: {reason(error)}", file=sys.stderr, flush=True)
        tidy(forget)


def tidy(forget: Any) -> None:
    """Frees memory."""
    forget()
    gc.collect()
    torch.cuda.empty_cache()
