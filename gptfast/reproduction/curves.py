"""Pictures of a reproduction: loss and perplexity per epoch, beside the course's."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from gptfast.pictures import COLOURS, GREY
from gptfast.reproduction.exercises import EXERCISES, Exercise, Trained, means, perplexity

Quantity = Literal["loss", "perplexity"]
LABELS = {"loss": "loss (nats per character)", "perplexity": "perplexity"}
PARTS = ("training", "held-out")


def draw(runs: Mapping[str, list[Trained]], quantity: Quantity) -> Any:
    """Draws a panel per exercise: the mean over the seeds, their range, and the course's values.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, len(EXERCISES))
    for axes, exercise in zip(panels, EXERCISES, strict=True):
        _draw_exercise(axes, exercise, runs[exercise.preset], quantity)
    panels[0].set_ylabel(LABELS[quantity])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_exercise(axes: Any, exercise: Exercise, runs: list[Trained], quantity: Quantity) -> None:
    from matplotlib.ticker import MaxNLocator

    value: Callable[[float], float] = float if quantity == "loss" else perplexity
    for part, label in enumerate(PARTS):
        style = ("dashed", "solid")[part]
        colour = (COLOURS[1], COLOURS[0])[part]
        ours = [value(losses[part]) for losses in means(runs)]
        epochs = range(1, len(ours) + 1)
        axes.plot(epochs, ours, label=label, color=colour, linestyle=style, marker="o")
        if len(runs) > 1:
            seeds = [[value(losses[part]) for losses in run.losses] for run in runs]
            lowest, highest = (
                [pick(each) for each in zip(*seeds, strict=True)] for pick in (min, max)
            )
            axes.fill_between(epochs, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        theirs = [value(losses[part]) for losses in exercise.course[: len(ours)]]
        axes.plot(
            range(1, len(theirs) + 1),
            theirs,
            label=f"{label}, the course",
            color=GREY,
            linestyle=style,
            linewidth=1,
            marker="x",
        )
    axes.set_title(exercise.title, loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(colors=GREY)
