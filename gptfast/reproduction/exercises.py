"""The exercises with the course's results, and what a reproduction gives."""

import math
from dataclasses import dataclass
from pathlib import Path

Losses = tuple[float, float]  # of an epoch: training and held-out, nats per character

LIMIT = 0.03  # nats; how far our held-out loss may be from the course's after the last epoch


@dataclass(frozen=True)
class Exercise:
    """An exercise of the course, and the losses after each epoch that others have published."""

    preset: str
    title: str
    course: tuple[Losses, ...]
    torch: tuple[Losses, ...] = ()  # the course's model in plain torch, seed 0


EXERCISES = (
    Exercise(
        preset="shakespeare",
        title="With attention",
        course=((1.7662, 1.7427), (1.5275, 1.7108), (1.4769, 1.6940)),
        torch=((1.7634, 1.7404), (1.5217, 1.7023), (1.4726, 1.6800)),
    ),
    Exercise(
        preset="shakespeare-no-attention",
        title="Without attention",
        course=((2.4520, 2.5450), (2.4310, 2.5430), (2.4290, 2.5480)),
    ),
)


@dataclass(frozen=True)
class Trained:
    """A run of an exercise that is finished."""

    seed: int
    losses: list[Losses]  # per evaluation, of which each epoch has one
    seconds: float  # of training, without evaluations
    tokens_per_s: float
    sample: str  # with its prompt


@dataclass(frozen=True)
class Reproduction:
    """What `reproduce` gives.

    Attributes:
        runs: Those of each exercise, by the preset's name.
        report: The report; None if a signal ended a run.
        signal: The signal that ended it, or None.
    """

    runs: dict[str, list[Trained]]
    report: Path | None
    signal: int | None = None

    @property
    def difference(self) -> float:
        """Our last held-out loss less the course's, of the exercise with attention, in nats."""
        exercise = EXERCISES[0]
        return means(self.runs[exercise.preset])[-1][1] - exercise.course[-1][1]

    @property
    def agrees(self) -> bool:
        """Whether the difference is within LIMIT."""
        return abs(self.difference) <= LIMIT


def means(runs: list[Trained]) -> list[Losses]:
    """The losses of each epoch in the mean over the seeds."""
    return [
        (sum(train for train, _ in epoch) / len(runs), sum(val for _, val in epoch) / len(runs))
        for epoch in zip(*(run.losses for run in runs), strict=True)
    ]


def perplexity(loss: float) -> float:
    """The exponential of a loss, which is clamped because a run may have diverged."""
    return math.exp(min(loss, 700.0))
