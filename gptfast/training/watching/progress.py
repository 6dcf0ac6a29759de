"""The progress bar of a run."""

import contextlib
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptfast.console import Console
from gptfast.errors import ConfigError
from gptfast.presets import PRESETS
from gptfast.run_file import RUN_FILE_NAME, read_run_file
from gptfast.training.callbacks import Callback
from gptfast.training.state import Row
from gptfast.training.watching import machine
from gptfast.training.watching.notebook import NotebookBar, in_notebook

if TYPE_CHECKING:
    from gptfast.training.loop import Loop

UPDATES_PER_SECOND = 10


class TerminalBar:
    """A bar on stderr, with the lines of evaluations above it.

    A terminal that has gone, or a file that is full, does not end the run: the bar shows no more.

    Args:
        total: Steps of the run.
        completed: Steps that are done already.
    """

    def __init__(self, total: int, completed: int) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total, completed=completed, numbers="")
        self._gone = False
        self._show(self._bar.start)
        self._started = not self._gone

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._show(self._console.print, text, markup=False)

    def update(self, completed: int, numbers: str | None = None) -> None:
        """Shows how many steps are done, and the numbers beside the bar if they have changed."""
        changed = {} if numbers is None else {"numbers": numbers}
        self._show(self._bar.update, self._task, completed=completed, **changed)

    def stop(self) -> None:
        """Ends the bar, which stays as it is."""
        if self._started:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()

    def _show(self, show: Callable[..., Any], *args: Any, **options: Any) -> None:
        if not self._gone:
            try:
                show(*args, **options)
            except (OSError, ValueError):  # of a stream that is closed
                self._gone = True


class ProgressBar(Callback):
    """Shows the loss, tokens/s, the fraction of the machine's peak, and the time left.

    Each evaluation is a line above the bar, which is on stderr, and in a notebook below the cell.
    The fraction is the rate at which the steps compute (see `flops_per_token`), divided by the rate
    of the fastest matrix product (see `peak`).
    """

    def on_start(self, run: "Loop") -> None:
        """Measures the machine's peak and shows the bar."""
        peak = 1e9 * machine.peak(run.trainer.device, run.config.precision)  # FLOP/s
        peak *= run.processes.size
        self._peak_tokens = peak / machine.flops_per_token(run.model.config)  # per second
        self._updated = 0.0
        bar = NotebookBar if in_notebook() else TerminalBar
        self._bar = bar(run.total, run.state.step)
        note = run.trainer.note()
        if note is not None:
            self._bar.line(note)
        data, fraction = run.extra.get("data"), run.config.text_fraction
        if data is not None and fraction < 1.0:
            name = Path(data).name if Path(data).is_file() else "the text"
            part = f"the first {100 * fraction:g} % of {name}"
            how = "--train.text-fraction 1 (text_fraction=1 in Python)"
            self._bar.line(f"uses {part}; {how} uses all")

    def on_step(self, run: "Loop") -> None:
        """Updates the bar, at most UPDATES_PER_SECOND times a second."""
        now, state = time.perf_counter(), run.state
        if now - self._updated < 1 / UPDATES_PER_SECOND:
            return
        self._updated = now
        if state.loss_steps:
            speed = state.row_tokens / state.row_seconds if state.row_seconds else math.nan
            self._show(run, state.loss_sum / state.loss_steps, speed)

    def on_evaluation(self, run: "Loop", row: Row) -> None:
        """Shows the row as a line."""
        held_out = ""
        if row["val_loss"] is not None:
            held_out = f", held-out loss {row['val_loss']:.4f} (perplexity {row['perplexity']:.3f})"
        self._bar.line(f"step {row['step']}: train loss {row['train_loss']:.4f}{held_out}")
        self._show(run, row["train_loss"], row["tokens_per_s"])

    def on_end(self, run: "Loop") -> None:
        """Ends the bar; says where a run that was interrupted is kept."""
        state = run.state
        if run.error is None:
            self._bar.update(state.step)
        self._bar.stop()
        if run.error is None and run.interrupted:
            kept = "nothing was saved"
            if run.path is not None:
                kept = f"saved in {run.path}; {_how_to_resume(run.path)} goes on from there"
            self._bar.line(f"interrupted at step {state.step} of {run.total}, {kept}")

    def _show(self, run: "Loop", loss: float, speed: float) -> None:
        # Measured once, at the start, while something else may have been running.
        self._peak_tokens = max(self._peak_tokens, speed)
        numbers = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {speed / self._peak_tokens:.0%} of peak"
        self._bar.update(run.state.step, numbers)


def _how_to_resume(path: Path) -> str:
    """Returns the command that resumes the run in a folder, or "resume" if only Python can."""
    file = path / RUN_FILE_NAME
    try:
        table = read_run_file(file)["run"]
    except ConfigError:  # `Trainer.fit` alone writes none
        return "resume"
    data = Path(table.get("data", path))
    if table.get("preset") not in PRESETS or not (data.is_file() or data.is_dir()):
        return "resume"  # a pipe cannot be read again
    config, out = shlex.quote(str(file)), shlex.quote(str(path))
    return f"`gptfast train --config {config} --out {out} --resume`"
