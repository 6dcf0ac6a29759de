"""Where a run is, as its training state keeps it, and the rows of its history."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

Row = dict[str, Any]


@dataclass
class RunState:
    """Where a run is."""

    step: int = 0
    seconds: float = 0.0  # of training; evaluations and saves are not counted
    loss_sum: float = 0.0  # since the last evaluation, as are the next three
    loss_steps: int = 0
    row_tokens: int = 0
    row_seconds: float = 0.0
    history: list[Row] = field(default_factory=list)
    best_loss: float = math.inf  # of the best evaluation so far, on eval_tokens at most
    best_step: int = 0  # 0: there is none
    not_better: int = 0  # evaluations since the best one

    def count(self, loss: float, tokens: int, seconds: float) -> None:
        """Counts one more step."""
        self.step += 1
        self.loss_sum += loss
        self.loss_steps += 1
        self.row_tokens += tokens
        self.row_seconds += seconds
        self.seconds += seconds

    def end_row(self, row: Row) -> None:
        """Adds a row to the history and starts the sums of the next one."""
        self.history.append(row)
        self.loss_sum, self.loss_steps, self.row_tokens, self.row_seconds = 0.0, 0, 0, 0.0

    @property
    def best(self) -> tuple[float, int, int]:
        """Loss and step of the best evaluation, and how many there were since."""
        return self.best_loss, self.best_step, self.not_better

    def unsaved_best(self, before: tuple[float, int, int]) -> None:
        """Takes back that the last evaluation was the best: its weights could not be saved.

        Args:
            before: `best` before that evaluation.
        """
        self.best_loss, self.best_step, self.not_better = before
        self.not_better += 1

    def forget_best(self) -> None:
        """Makes the next evaluation the best one."""
        self.best_loss, self.best_step, self.not_better = math.inf, 0, 0

    def is_best(self, loss: float) -> bool:
        """Notes an evaluation's held-out loss; returns whether it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.not_better = loss, self.step, 0
            return True
        self.not_better += 1
        return False


def run_state(values: dict[str, Any], version: int) -> RunState:
    """Makes a state from values by `dataclasses.asdict`, in this version of the file.

    Raises KeyError, TypeError or ValueError where the values are of no run.
    """
    if version < 3:
        new = ("best_loss", "best_step", "not_better")
        values = {name: getattr(RunState(), name) for name in new} | values
    for each in fields(RunState):
        value = values[each.name]
        wanted: Any = type(getattr(RunState(), each.name))
        if not isinstance(value, int | float if wanted is float else wanted):
            raise TypeError(f"{each.name} is a {type(value).__name__}")
    for row in values["history"]:
        if not isinstance(row, dict):
            raise TypeError(f"a row of the history is a {type(row).__name__}")
    lines_of(values["history"])
    return RunState(**values)


def lines_of(history: list[Row]) -> str:
    """A line of JSON per row; raises TypeError or ValueError for what JSON does not have."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
