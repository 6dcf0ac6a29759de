"""The report of a reproduction: tables beside the course's, pictures, samples."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptfast.files import write_atomic
from gptfast.info import info
from gptfast.pictures import save_picture
from gptfast.reproduction.curves import draw
from gptfast.reproduction.exercises import (
    EXERCISES,
    LIMIT,
    Exercise,
    Losses,
    Reproduction,
    Trained,
    means,
    perplexity,
)

REPORT_NAME = "report.md"
PICTURES = {"loss": "loss.png", "perplexity": "perplexity.png"}

Runs = Mapping[str, list[Trained]]


def write_report(out: Path, runs: Runs, how: str) -> Path:
    """Writes the report and its pictures.

    Args:
        out: The directory.
        runs: The runs of each exercise, by the preset's name.
        how: What computed, in words.

    Returns:
        The report's path.

    Raises:
        ConfigError, DataError: A picture cannot be drawn.
        OSError: The report cannot be written.
    """
    for quantity, name in PICTURES.items():
        save_picture(out / name, lambda quantity=quantity: draw(runs, quantity))  # type: ignore[misc]
    path = out / REPORT_NAME
    write_atomic({path: _report(runs, how).encode("utf-8")})
    return path


def _report(runs: Runs, how: str) -> str:
    count = len(runs[EXERCISES[0].preset])
    parts = [
        "# The course's exercises, reproduced",
        f"`gptfast reproduce --seeds {count}` trained the model of the course's two exercises on "
        f"Tiny Shakespeare, each with {_times(count)}. Losses are in nats per character: of an "
        "epoch of training, the mean over its steps with dropout; held out, that of the whole "
        "held-out text after the epoch, in disjoint windows and without dropout.",
        _verdict(Reproduction(dict(runs), None)),
        f"![Loss of each epoch]({PICTURES['loss']})",
        f"![Perplexity of each epoch]({PICTURES['perplexity']})",
    ]
    for exercise in EXERCISES:
        parts += _section(exercise, runs[exercise.preset])
    parts += ["## Machine and time", _machine(how), _seconds(runs), "## Samples"]
    for exercise in EXERCISES:
        for run in runs[exercise.preset]:
            parts += [f"### {exercise.title}, seed {run.seed}", f"~~~text\n{run.sample}\n~~~"]
    return "\n\n".join(parts) + "\n"


def _verdict(found: Reproduction) -> str:
    exercise = EXERCISES[0]
    epochs = len(found.runs[exercise.preset][0].losses)
    if epochs != len(exercise.course):
        return f"The runs have {epochs} evaluations, the course's {len(exercise.course)}."
    loss = means(found.runs[exercise.preset])[-1][1]
    sentence = (
        f"After epoch {epochs} with attention the held-out loss is {loss:.4f} in the mean, "
        f"{abs(found.difference):.4f} {'above' if found.difference > 0 else 'below'} the course's "
        f"{exercise.course[-1][1]:.4f}: "
    )
    if found.agrees:
        return f"{sentence}within the {LIMIT} that were allowed."
    return (
        f"{sentence}more than the {LIMIT} that were allowed. "
        "`gptfast reproduce --backend reference` shows whether plain torch ends there too."
    )


def _section(exercise: Exercise, runs: list[Trained]) -> list[str]:
    ours = means(runs)
    columns: dict[str, Sequence[Losses]] = {"the course": exercise.course}
    if exercise.torch:
        columns["plain torch, seed 0"] = exercise.torch
    columns |= {f"gptfast, mean of {_times(len(runs))}": ours}
    if len(runs) > 1:
        columns |= {f"gptfast, seed {run.seed}": run.losses for run in runs}
    last = [run.losses[-1][1] for run in runs]
    return [
        f"## {exercise.title}: `gptfast train {exercise.preset}`",
        "Loss, training / held out:",
        _table(columns, len(ours), lambda loss: f"{loss:.4f}"),
        "Perplexity, training / held out:",
        _table(columns, len(ours), lambda loss: f"{perplexity(loss):.3f}"),
        f"The seeds' last held-out losses are up to {max(last) - min(last):.4f} apart.",
    ]


def _table(
    columns: Mapping[str, Sequence[Losses]], epochs: int, show: Callable[[float], str]
) -> str:
    """A line per epoch; a column has nothing where it has no such epoch."""
    lines = [["epoch", *columns], ["---:"] * (len(columns) + 1)]
    for epoch in range(epochs):
        cells = (
            " / ".join(map(show, losses[epoch])) if epoch < len(losses) else ""
            for losses in columns.values()
        )
        lines.append([str(epoch + 1), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _machine(how: str) -> str:
    facts = info()
    isa = facts["isa"]["chosen"] or "none"
    gpu = "" if facts["gpu"] is None else f", {facts['gpu']}"
    return (
        f"Computed by {how}: {facts['cpu']}{gpu}, instruction set {isa}, "
        f"{facts['threads']['torch']} threads; gptfast {facts['gptfast']}, torch {facts['torch']}, "
        f"Python {facts['python']}; {datetime.date.today().isoformat()}."
    )


def _seconds(runs: Runs) -> str:
    """A line per run, and their sum."""
    lines = ["| run | seconds of training | tokens/s |", "| --- | ---: | ---: |"]
    for name, trained in runs.items():
        lines += [
            f"| {name}, seed {run.seed} | {run.seconds:,.1f} | {run.tokens_per_s:,.0f} |"
            for run in trained
        ]
    total = sum(run.seconds for trained in runs.values() for run in trained)
    return "\n".join([*lines, f"| all | {total:,.1f} | |"])


def _times(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
