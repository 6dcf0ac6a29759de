"""The progress display of a run, and the signals that end it."""

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptfast.training.run import Row, RunState

Report = Callable[[Row | str | None], None]

# Signals that ask a process to end, with the default handler of each. (SIGHUP reports that the
# terminal was closed; Windows lacks it.)
ENDING: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if hasattr(signal, "SIGHUP"):
    ENDING[signal.SIGHUP] = signal.SIG_DFL


@contextmanager
def bar(
    state: RunState, total: int, where: Path | None, shown: bool, note: str | None = None
) -> Iterator[Report]:
    """Shows a progress bar on stderr.

    Args:
        state: the state of the run, read at each report.
        total: the number of steps of the run.
        where: the run's directory, for the message after an interrupt.
        shown: False shows nothing.
        note: a line to begin with.

    Yields:
        a function that updates the bar. Given an evaluation's row or a warning, it prints a line;
        if nothing is shown, it issues warnings by Python's `warnings` module.
    """
    if not shown:
        yield lambda event: warnings.warn(event, stacklevel=2) if isinstance(event, str) else None
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if note is not None:
        console.print(note, markup=False)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=state.step, numbers="")

        def report(event: Row | str | None) -> None:
            if isinstance(event, str):
                console.print(f"warning: {event}", markup=False)
                return
            if event is not None:
                console.print(_sentence(event))
                loss, speed = event["train_loss"], event["tokens_per_s"]
            else:
                loss = state.loss_sum / max(1, state.loss_steps)
                speed = state.row_tokens / state.row_seconds if state.row_seconds else math.nan
            numbers = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
            progress.update(task, completed=state.step, numbers=numbers)

        yield report
        if state.step < total:
            progress.update(task, completed=state.step)
    if state.step < total:
        kept = (
            "nothing was saved" if where is None else f"saved in {where}; resume goes on from there"
        )
        console.print(f"interrupted at step {state.step} of {total}, {kept}")


def _sentence(row: Row) -> str:
    held_out = ""
    if row["val_loss"] is not None:
        held_out = f", held-out loss {row['val_loss']:.4f} (perplexity {row['perplexity']:.3f})"
    return f"step {row['step']}: train loss {row['train_loss']:.4f}{held_out}"


@contextmanager
def first_interrupt() -> Iterator[Callable[[], int | None]]:
    """Records the first signal of ENDING; a second one has its default effect.

    An exception within a step could leave weights and optimizer state partly updated. Signals that
    the program handles or ignores keep their handlers; outside the main thread all signals do.

    Yields:
        a function that returns the signal received, or None.
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
        restore()


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
