"""Shared by trackers of experiments: which numbers of a run they get, and when."""

from typing import TYPE_CHECKING

from gptfast.training.callbacks import Callback
from gptfast.training.state import Row

if TYPE_CHECKING:
    from gptfast.training.loop import Loop

NAMES = {"train_loss": "loss/training", "val_loss": "loss/held-out"}  # of a row's fields


class Tracker(Callback):
    """Sends a run's numbers to another program: the loss each few steps, and every evaluation.

    Args:
        every: How many steps to average for each `loss/steps` that is sent.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._losses: list[float] = []

    def send(self, step: int, numbers: dict[str, float]) -> None:
        """Sends numbers that belong to a step."""
        raise NotImplementedError

    def on_step(self, run: "Loop") -> None:
        """Sends the mean loss of the last steps, once there are enough of them."""
        self._losses.append(run.loss)
        if len(self._losses) >= self.every:
            self.send(run.state.step, {"loss/steps": sum(self._losses) / len(self._losses)})
            self._losses.clear()

    def on_evaluation(self, run: "Loop", row: Row) -> None:
        """Sends the numbers of a row of the history."""
        numbers = {NAMES.get(name, name): value for name, value in row.items() if name != "step"}
        self.send(row["step"], {name: x for name, x in numbers.items() if x is not None})
