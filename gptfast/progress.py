"""What a run shows on the terminal, and how Ctrl-C ends it."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptfast.run import Row, RunState

Report = Callable[[Row | None], None]


@contextmanager
def bar(state: RunState, total: int, where: Path | None, shown: bool) -> Iterator[Report]:
    """Shows a progress bar on stderr.

    Args:
        state: where the run is; it is read at each report.
        total: the run's steps.
        where: the run's directory, for the message after an interrupt.
        shown: False shows nothing.

    Yields:
        a function that brings the bar up to date, and prints a line for the row of an evaluation.
    """
    if not shown:
        yield lambda row: None
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=state.step, numbers="")

        def report(row: Row | None) -> None:
            if row is not None:
                console.print(_sentence(row))
                loss, speed = row["train_loss"], row["tokens_per_s"]
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
def first_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request; a second one raises KeyboardInterrupt.

    An exception in the middle of a step would leave weights and optimizer half moved on. A program
    that handles SIGINT itself, or trains outside its main thread, keeps its own way.

    Yields:
        a function that tells whether Ctrl-C was pressed.
    """
    pressed = False
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main:
        yield lambda: False
        return

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
