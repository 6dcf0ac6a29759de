"""Two processes of one group, which do what a test asks them to."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZE = 2


class Pair:
    """Starts the processes, which takes seconds: a file of tests needs one.

    Args:
        folder: where they find each other.
    """

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, f"file://{folder / 'group'}", theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function of a test's module in both; returns both results."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = [pipe.recv() for pipe in self._pipes]
        for rank, (_, error) in enumerate(results):
            assert error is None, f"rank {rank}: {error}"
        return [result for result, _ in results]

    def close(self) -> None:
        """Ends both."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)


def _serve(rank: int, group: str, pipe: Connection) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=group, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    while (asked := pipe.recv()) is not None:
        function, args = asked
        try:
            pipe.send((function(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    distributed.destroy_process_group()
