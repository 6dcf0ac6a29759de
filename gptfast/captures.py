"""Captures of CUDA graphs: one at a time in a process."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

# A capture begins by waiting for the whole device, which fails during another capture.
_capturing = threading.RLock()


@contextlib.contextmanager
def captured(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
    """Captures what this thread queues on the current device, while other threads go on.

    Afterwards the current stream is the one from before, also if the capture fails: torch's own
    context then leaves the stream of the capture, because the end of the capture raises.

    Args:
        graph: A torch.cuda.CUDAGraph that receives it.
        pool: Where its memory comes from; None makes a pool of its own.
        stream: A torch.cuda.Stream to capture on.

    Raises:
        RuntimeError: Something was queued that cannot be captured.
    """
    current = torch.cuda.current_stream()
    mode = "thread_local"
    with _capturing:
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
                yield
        except RuntimeError:
            torch.cuda.set_stream(current)
            raise
