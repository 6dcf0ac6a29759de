"""The signals that end a run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Signals that ask a process to end, with the default handler of each. (SIGHUP reports that the
# terminal was closed; Windows lacks it.)
ENDING: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if hasattr(signal, "SIGHUP"):
    ENDING[signal.SIGHUP] = signal.SIG_DFL


@contextmanager
def first_interrupt() -> Iterator[Callable[[], int | None]]:
    """Records the first signal of ENDING; a second one has its default effect.

    An exception within a step could leave weights and optimizer state partly updated. Signals that
    the program handles or ignores keep their handlers; outside the main thread all signals do.

    Yields:
        A function that returns the signal received, or None.
    """
    came: int | None = None
    usual = [number for number in ENDING if signal.getsignal(number) == ENDING[number]]
    ours = usual if _in_main_thread() else []

    def restore() -> None:
        for number in ours:
            signal.signal(number, ENDING[number])

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = signum
        restore()

    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number in ours:
            if signal.getsignal(number) is note:
                signal.signal(number, ENDING[number])


@contextmanager
def handles_ctrl_c() -> Iterator[None]:
    """Enables SIGINT if it is ignored, as in background jobs of a shell script."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN and _in_main_thread()
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
