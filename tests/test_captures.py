"""Captures of CUDA graphs, with a device that is not there."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptfast.captures import captured


class Device:
    """Notes captures; one that is `broken` ends as torch's do: the stream stays that of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.broken, self.capturing, self.modes = "own", False, 0, set[str]()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(
            torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream)
        )
        monkeypatch.setattr(torch.cuda, "graph", self._graph)

    @contextlib.contextmanager
    def _graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        self.modes.add(capture_error_mode)
        self.capturing += 1
        assert self.capturing == 1
        yield
        self.capturing -= 1
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.stream = before


def test_the_stream_is_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    with captured(None, None, "side"):
        assert device.stream == "side"
    assert device.stream == "own" and device.modes == {"thread_local"}
    device.broken = True
    with pytest.raises(RuntimeError, match="not permitted"), captured(None, None, "side"):
        pass
    assert device.stream == "own"


def test_threads_capture_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    entered, may_leave, done = threading.Event(), threading.Event(), []

    def capture() -> None:
        with captured(None, None, "side"):
            entered.set()
            may_leave.wait(5)
        done.append(1)

    threads = [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(5) and device.capturing == 1 and not done
    may_leave.set()
    for thread in threads:
        thread.join()
    assert done == [1, 1]
