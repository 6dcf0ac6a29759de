"""From logits to tokens, in plain torch: the specification of csrc/kernels/layers/sampling.inl."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from gptfast.checks import whole
from gptfast.errors import ConfigError
from gptfast.ops.random import WORD, philox

SAMPLING_STREAM = WORD  # apart from every dropout's stream
# The engine computes in float32, where factors beyond these would leave its range.
MOST_TEMPERATURE, MOST_PENALTY = 1e6, 1e3


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; `generate` says what the options mean.

    Raises:
        ConfigError: An option is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not _within(self.temperature, 0.0, MOST_TEMPERATURE):
            raise ConfigError(
                f"temperature must be 0 (greedy) or positive, at most {MOST_TEMPERATURE:g},"
                f" got {self.temperature!r}"
            )
        if self.top_k is not None:
            count = whole(self.top_k)
            if count is None or count < 0:
                raise ConfigError(
                    "top_k must be None, 0 (from all tokens) or a positive whole number,"
                    f" got {self.top_k!r}"
                )
            object.__setattr__(self, "top_k", count or None)
        if self.top_p is not None and not (_within(self.top_p, 0.0, 1.0) and self.top_p > 0.0):
            raise ConfigError(f"top_p must be None or in (0, 1], got {self.top_p!r}")
        if self.min_p is not None and not _within(self.min_p, 0.0, 1.0):
            raise ConfigError(f"min_p must be None or in [0, 1], got {self.min_p!r}")
        if not _within(self.repetition_penalty, 1 / MOST_PENALTY, MOST_PENALTY):
            raise ConfigError(
                f"repetition_penalty must be in [{1 / MOST_PENALTY:g}, {MOST_PENALTY:g}],"
                f" got {self.repetition_penalty!r}"
            )
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)  # may be of any type of numbers, which torch does not take
            object.__setattr__(self, name, None if value is None else float(value))

    def as_numbers(self, vocab_size: int) -> tuple[float, int, float, float, float]:
        """Temperature, top_k, top_p, min_p, penalty; what is None as the number of no limit."""
        return (
            self.temperature,
            min(self.top_k or 0, vocab_size),
            1.0 if self.top_p is None else self.top_p,
            self.min_p or 0.0,
            self.repetition_penalty,
        )


def _within(value: object, least: float, most: float) -> bool:
    return isinstance(value, (float, int, Real)) and least <= float(value) <= most


def choose(
    how: Sampling, logits: Tensor, seen: Sequence[Sequence[int]], uniforms: Tensor
) -> Tensor:
    """Chooses a token per row.

    Args:
        how: The options.
        logits: (n, V) float.
        seen: The tokens that each row's penalty applies to.
        uniforms: (n,) float64 in [0, 1), the draws.

    Returns:
        (n,) int64.
    """
    scores = logits.double()
    if how.repetition_penalty != 1.0:
        for row, tokens in zip(scores, seen, strict=True):
            picked = row[list(tokens)]
            penalized = torch.where(
                picked > 0, picked / how.repetition_penalty, picked * how.repetition_penalty
            )
            row[list(tokens)] = penalized
    if how.temperature == 0.0:
        return scores.argmax(-1)
    # The first token whose cumulative probability exceeds the draw; one without probability never
    # does.
    cumulative = probabilities(how, scores).cumsum(-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def probabilities(how: Sampling, scores: Tensor) -> Tensor:
    """The distribution (n, V) to draw from, at a temperature above 0, up to a factor per row."""
    weights = ((scores - scores.amax(-1, keepdim=True)) / how.temperature).exp()
    if how.top_k is not None and how.top_k < scores.shape[-1]:
        weights = weights.where(scores >= scores.topk(how.top_k).values[:, -1:], 0.0)
    if how.top_p is not None:
        falling = weights.sort(descending=True).values
        mass = falling.cumsum(-1)
        enough = (mass < how.top_p * mass[:, -1:]).sum(-1, keepdim=True)  # the last token needed
        weights = weights.where(weights >= falling.gather(-1, enough), 0.0)
    if how.min_p is not None:
        weights = weights.where(weights >= how.min_p, 0.0)
    return weights


def draws(seeds: Tensor, numbers: Tensor, steps: Tensor) -> Tensor:
    """A number in [0, 1) of 53 bits for each sequence, (n,) float64.

    It is a Philox number with key `seeds` and counter (steps, numbers), all (n,) int64: a sequence
    gets the same draws alone and in any batch.
    """
    high, low, _, _ = philox((steps, numbers, 0, SAMPLING_STREAM), seeds)
    return ((high << 21) + (low >> 11)).double() * 2.0**-53
