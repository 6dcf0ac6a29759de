"""What may watch a run: a callback, whose methods the loop calls."""

from typing import TYPE_CHECKING

from gptfast.training.run import Row

if TYPE_CHECKING:
    from gptfast.training.loop import Loop


class Callback:
    """Watches a run: derive from it, override what you need, and pass it to `train` or `fit`.

    Every method gets the run. It has `model` and `tokenizer`; `config`, the TrainConfig; `state`
    with `step`, `seconds` and `history`; `total`, the steps of the whole run; `path`, its directory
    or None; and `stop()`, which ends the run after the current step, as Ctrl-C does.

    Several callbacks are called in the order given, in the thread that trains: what they take, the
    run waits for, but it is not counted as time of training. An exception ends the run. Printing
    does not disturb the progress bar. A run draws no random numbers from torch's or Python's global
    generators, so a callback that does leaves its results as they are; one that changes weights or
    gradients changes them.
    """

    def on_start(self, run: "Loop") -> None:
        """The run begins, or goes on where it was interrupted: `run.state` says where."""

    def on_step(self, run: "Loop") -> None:
        """A step has ended. On a GPU the newest steps may not have been counted in `run.state`."""

    def on_evaluation(self, run: "Loop", row: Row) -> None:
        """An evaluation has ended; `row` is its row of the history, see `Trainer.fit`.

        It comes after the step's `on_step` and before the save that follows an evaluation.
        """

    def on_save(self, run: "Loop") -> None:
        """A checkpoint has been written to `run.path`."""

    def on_end(self, run: "Loop") -> None:
        """The run has ended: by its last step, by `stop`, a signal, or an exception.

        It is called for every callback whose `on_start` was; after an exception too, for closing
        files.
        """
