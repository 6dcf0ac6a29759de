"""Callbacks watch a run: the loop calls their methods."""

from typing import TYPE_CHECKING

from gptfast.training.state import Row

if TYPE_CHECKING:
    from gptfast.training.loop import Loop


class Callback:
    """Watches a run: derive from it, override what you need, and pass it to `train` or `fit`.

    Every method gets the run. It has `model`, as it is evaluated, and `tokenizer`; `config`, the
    TrainConfig; `state` with `step`, `seconds` and `history`; `loss`, that of the step counted
    last; `total`, the steps of the whole run; `path`, its directory or None; `stop()`, which ends
    the run after the step that is under way, as if it were the last one; and `warn(message)`.

    Several callbacks are called in the order given, in the thread that trains: the run waits for
    them, which does not count as time of training. An exception ends the run. What is printed
    appears above the progress bar. A run draws no random numbers from torch's or Python's global
    generators, so a callback that does leaves its results as they are.
    """

    def on_start(self, run: "Loop") -> None:
        """The run begins, or goes on where it was interrupted: `run.state` says where."""

    def on_step(self, run: "Loop") -> None:
        """The loss of a step is known: `run.loss`; the next step may have been taken meanwhile."""

    def on_evaluation(self, run: "Loop", row: Row) -> None:
        """An evaluation has ended; `row` is its row of the history, see `Trainer.fit`.

        It comes after the step's `on_step` and before the save that follows an evaluation.
        """

    def on_save(self, run: "Loop") -> None:
        """A checkpoint has been written to `run.path`."""

    def on_end(self, run: "Loop") -> None:
        """The run has ended: by its last step, by `stop`, a signal, or an exception (`run.error`).

        It is called, in the reverse order, for all callbacks whose `on_start` has returned.
        """
