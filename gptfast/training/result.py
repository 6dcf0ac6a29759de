"""The result of a run, and how it is shown."""

from dataclasses import dataclass
from signal import Signals
from typing import Any

from gptfast import markup
from gptfast.model import GPT
from gptfast.pictures import can_draw, png
from gptfast.tokenizer import Tokenizer
from gptfast.training.plots import history_figure
from gptfast.training.state import Row

ROWS_SHOWN = 10  # evaluations, where no picture can be drawn
PICTURE_WIDTH = 560  # pixels


@dataclass(frozen=True)
class TrainResult:
    """The result of a run that is finished or was interrupted.

    A notebook shows its last and best losses and, with matplotlib, the curves.
    """

    model: GPT  # in evaluation mode
    tokenizer: Tokenizer | None
    history: list[Row]  # the rows of history.jsonl
    interrupted: bool  # a signal ended the run before its last step
    signal: int | None = None  # the signal that was received, also if during the last step
    # the history's row with the best loss, whose weights are in the run's `best`; None without
    # held-out text
    best: Row | None = None

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else {}
        shown = {"step": last.get("step", 0), "evaluations": len(self.history)}
        shown |= {name: last[name] for name in ("train_loss", "val_loss") if name in last}
        if self.best is not None:
            shown |= {"best_step": self.best["step"], "best_loss": self.best["val_loss"]}
        shown |= {"interrupted": self.interrupted, "signal": self.signal}
        values = (f"{name}={_number(value)}" for name, value in shown.items())
        return f"TrainResult({', '.join(values)})"

    def _repr_html_(self) -> str:
        title = "Finished run" if not self.interrupted else "Interrupted run"
        if self.signal is not None:
            title += f" ({Signals(self.signal).name})"
        parts = [markup.table(self._facts())]
        if len(self.history) > 1 and can_draw():
            text = "the losses by step"
            parts.append(markup.picture(png(history_figure(self.history)), text, PICTURE_WIDTH))
        elif self.history:
            parts.append(_losses(self.history))
        return markup.section(title, *parts)

    def _facts(self) -> list[tuple[str, str]]:
        size = sum(each.numel() for each in self.model.parameters())
        facts = [("model", f"GPT of {size:,} parameters"), ("tokenizer", repr(self.tokenizer))]
        if not self.history:
            return [*facts, ("steps", "none that was evaluated")]
        last = self.history[-1]
        facts += [
            ("steps", f"{last['step']:,}, {last['epoch']:.2f} epochs"),
            ("training loss", f"{last['train_loss']:.4f} nats per token"),
        ]
        if last["val_loss"] is not None:
            facts.append(("held-out loss", f"{last['val_loss']:.4f} nats per token"))
        if self.best is not None:
            facts.append(("best", f"{self.best['val_loss']:.4f} at step {self.best['step']:,}"))
        speed = f"{last['tokens_per_s']:,.0f} tokens/s, {last['seconds']:,.1f} s of training"
        return [*facts, ("speed", speed)]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else repr(value)


def _losses(history: list[Row]) -> str:
    """A table of the losses of some evaluations, the last one among them."""
    every = -(-len(history) // ROWS_SHOWN)
    rows = []
    for row in history[::-1][::every][::-1]:
        losses = (row["train_loss"], row["val_loss"])
        rows.append([f"{row['step']:,}", *("" if x is None else f"{x:.4f}" for x in losses)])
    return markup.table(rows, ("step", "training loss", "held-out loss"))
