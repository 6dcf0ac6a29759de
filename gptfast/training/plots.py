"""Plots of training runs. Requires matplotlib (the extra `plot`)."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptfast.checks import as_number
from gptfast.errors import ConfigError, DataError
from gptfast.pictures import COLOURS, GREY, check_matplotlib, save_picture
from gptfast.training.run import HISTORY_NAME
from gptfast.training.state import Row

Run = str | Path | Sequence[Row]
Quantity = Literal["loss", "perplexity", "lr"]
LABELS = {"loss": "loss (nats per token)", "perplexity": "perplexity", "lr": "learning rate"}


def plot_history(
    runs: Run | Sequence[str | Path] | Mapping[str, Run],
    path: str | Path,
    *,
    quantity: Quantity = "loss",
    title: str | None = None,
) -> Path:
    """Plots loss against step: held-out solid, training dashed, one colour per run.

    A training loss is the mean over the steps since the previous evaluation, with dropout; it is
    drawn at the middle of those steps. A perplexity is the exponential of a loss.

    Args:
        runs: One run, or several to compare. A run is its directory, its `history.jsonl`, or its
            history (rows with `step`, `train_loss`, `val_loss`); a mapping gives runs names.
        path: The file, PNG, SVG or PDF by its suffix; its directory is created if missing.
        quantity: What is plotted.
        title: The title of the plot.

    Returns:
        The path of the file.

    Raises:
        ConfigError: Unknown suffix or quantity, no runs or more than colours, or matplotlib is
            missing.
        DataError: A history is missing, empty or invalid, or the file cannot be written.
    """
    return save_picture(path, lambda: history_figure(runs, quantity=quantity, title=title))


def history_figure(
    runs: Run | Sequence[str | Path] | Mapping[str, Run],
    *,
    quantity: Quantity = "loss",
    title: str | None = None,
) -> Any:
    """Draws the picture that `plot_history` writes.

    Args:
        runs: As for `plot_history`.
        quantity: What is plotted.
        title: The title of the plot.

    Returns:
        A matplotlib Figure, which a notebook shows after `%matplotlib inline`.

    Raises:
        ConfigError: Unknown quantity, no runs or more than colours, or matplotlib is missing.
        DataError: A history is missing, empty or invalid.
    """
    if quantity not in LABELS:
        raise ConfigError(f"quantity must be one of {', '.join(LABELS)}, got {quantity!r}")
    check_matplotlib()
    return _draw(_histories(runs), quantity, title)


def read_history(path: str | Path) -> list[Row]:
    """Reads the history of a run.

    Args:
        path: The run's directory, or its `history.jsonl`.

    Returns:
        One row per evaluation; see `Trainer.fit`.

    Raises:
        DataError: The file is missing, cannot be read or is not a history.
    """
    file = Path(path)
    if file.is_dir():
        file = file / HISTORY_NAME
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not _is_row(row):
            raise DataError(f"{file}: line {number} is not a row of a history")
        rows.append(row)
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    """Whether a row has a step and losses that are numbers, of which the held-out one may lack."""
    needed = row.get("step"), row.get("train_loss")
    optional = row.get("val_loss"), row.get("lr")
    return None not in map(as_number, needed) and all(
        each is None or as_number(each) is not None for each in optional
    )


def _histories(runs: Any) -> dict[str, list[Row]]:
    if isinstance(runs, Mapping):
        named = dict(runs)
    elif isinstance(runs, str | Path):
        named = {_name(runs): runs}
    elif runs and all(isinstance(run, str | Path) for run in runs):
        named = {_name(run): run for run in runs}
        if len(named) < len(runs):  # equal names: use the whole paths
            named = {str(run): run for run in runs}
    else:
        named = {"": runs}
    histories = {}
    for name, run in named.items():
        rows = read_history(run) if isinstance(run, str | Path) else list(run)
        if not rows:
            raise DataError(f"{name or 'the run'}: its history is empty")
        histories[name] = rows
    if not 1 <= len(histories) <= len(COLOURS):
        raise ConfigError(f"a picture shows 1 to {len(COLOURS)} runs, got {len(histories)}")
    return histories


def _name(run: str | Path) -> str:
    path = Path(run)
    return path.parent.absolute().name if path.name == HISTORY_NAME else path.absolute().name


class _Curve(NamedTuple):
    label: str
    points: list[tuple[float, float]]  # step, value
    solid: bool


def _curves(rows: list[Row], quantity: Quantity) -> list[_Curve]:
    """The curves of a run, the main one first; some may have no points."""
    if quantity == "lr":
        rates = [(row["step"], row["lr"]) for row in rows if row.get("lr") is not None]
        return [_Curve("learning rate", rates, True)]
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    # A training loss is a mean over the steps since the previous row: draw it at their middle.
    steps = [row["step"] for row in rows]
    middles = [(a + b) / 2 for a, b in zip([0, *steps], steps, strict=False)]
    training = list(zip(middles, [row["train_loss"] for row in rows], strict=True))
    if quantity == "perplexity":  # the exponent is clamped for runs that have diverged
        held_out = [(step, math.exp(min(loss, 700.0))) for step, loss in held_out]
        training = [(step, math.exp(min(loss, 700.0))) for step, loss in training]
    return [_Curve("held-out", held_out, True), _Curve("training", training, False)]


def _draw(histories: Mapping[str, list[Row]], quantity: Quantity, title: str | None) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    # Use Figure directly, because pyplot would need a backend and global state.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    several = len(histories) > 1
    lines, labels = [], []
    for colour, (name, rows) in zip(COLOURS, histories.items(), strict=False):
        for curve in _curves(rows, quantity):
            if curve.points:
                labels.append(f"{name}, {curve.label}" if several else curve.label)
                lines += axes.plot(
                    *zip(*curve.points, strict=True),
                    label=labels[-1],
                    color=colour if several or curve.solid else COLOURS[1],
                    linewidth=1.8 if curve.solid else 1.2,
                    linestyle="solid" if curve.solid else (0, (4, 2)),
                    marker="o",
                    markersize=(4.0 if curve.solid else 2.4) if len(rows) <= 40 else 0.0,
                )
    axes.set_xlabel("step")
    axes.set_ylabel(LABELS[quantity])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(colors=GREY)
    # matplotlib leaves out what begins with "_", and reads what is between two "$" as a formula.
    shown = [f" {label}" if label.startswith("_") else label for label in map(_utf8, labels)]
    for text in axes.legend(lines, shown, frameon=False).get_texts():
        text.set_parse_math(False)
    if title:
        axes.set_title(_utf8(title), loc="left", parse_math=False)
    return figure


def _utf8(name: str) -> str:
    """Replaces what UTF-8 does not have, as in the names of some folders, by question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")
