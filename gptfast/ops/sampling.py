"""From logits to tokens, in plain torch: the specification of csrc/kernels/layers/sampling.inl.

Letters: n sequences, V vocab_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast.checks import as_int, as_number
from gptfast.errors import ConfigError
from gptfast.ops.random import WORD, philox

SAMPLING_STREAM = WORD  # no dropout has this Philox stream
# The kernels compute in float32, which larger factors would overflow.
MAX_TEMPERATURE, MAX_PENALTY = 1e6, 1e3
LEAST = 2.0**-126  # float32's smallest normal number; a smaller number could become 0
MAX_TOP_K = 2**31 - 1  # no vocabulary is larger


@dataclass(frozen=True, init=False)
class Sampling:
    """How a token is chosen; `generate` explains the options.

    The fields are numbers, in the order of `Sampling` in csrc/kernels/kernels.h. Only the
    constructor takes None, which stands for the number that sets no limit.

    Raises:
        ConfigError: An option is out of its range.
    """

    temperature: float  # 0: greedy
    top_k: int  # 0: no limit
    top_p: float  # 1: no limit
    min_p: float  # 0: no limit
    repetition_penalty: float  # 1: no penalty

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> None:
        if not _within(temperature, 0.0, MAX_TEMPERATURE):
            raise ConfigError(
                f"temperature must be 0 (greedy) or positive, at most {MAX_TEMPERATURE:g},"
                f" got {temperature!r}"
            )
        count = 0 if top_k is None else as_int(top_k)
        if count is None or count < 0:
            raise ConfigError(
                f"top_k must be None, 0 (from all tokens) or a positive whole number, got {top_k!r}"
            )
        if top_p is not None and not (_within(top_p, 0.0, 1.0) and top_p > 0.0):
            raise ConfigError(f"top_p must be None or in (0, 1], got {top_p!r}")
        if min_p is not None and not _within(min_p, 0.0, 1.0):
            raise ConfigError(f"min_p must be None or in [0, 1], got {min_p!r}")
        if not _within(repetition_penalty, 1 / MAX_PENALTY, MAX_PENALTY):
            raise ConfigError(
                f"repetition_penalty must be in [{1 / MAX_PENALTY:g}, {MAX_PENALTY:g}],"
                f" got {repetition_penalty!r}"
            )
        # float() because torch and the extension do not take every type of number.
        numbers = {
            "temperature": max(float(temperature), LEAST) if temperature else 0.0,
            "top_k": min(count, MAX_TOP_K),
            "top_p": 1.0 if top_p is None else max(float(top_p), LEAST),
            "min_p": 0.0 if min_p is None else float(min_p),
            "repetition_penalty": float(repetition_penalty),
        }
        for name, number in numbers.items():
            object.__setattr__(self, name, number)


def _within(value: object, least: float, most: float) -> bool:
    number = as_number(value)
    return number is not None and least <= number <= most


def choose(
    how: Sampling, logits: Tensor, seen: Sequence[Sequence[int]], uniforms: Tensor
) -> Tensor:
    """Chooses a token per sequence.

    Args:
        how: The options.
        logits: (n, V), any floating-point dtype; computed in float64.
        seen: The tokens that each sequence's repetition penalty applies to.
        uniforms: (n,) float64 in [0, 1), the draws; see `draws`.

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
    # Inverse transform sampling: the first token whose cumulative probability exceeds the draw,
    # which is never a token of probability 0.
    cumulative = probabilities(how, scores).cumsum(-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def probabilities(how: Sampling, scores: Tensor) -> Tensor:
    """Computes the distribution to draw from, without its normalisation.

    Args:
        how: The options; the temperature is above 0.
        scores: (n, V) float64, the logits after the repetition penalty.

    Returns:
        (n, V) float64, proportional to the probabilities of each row.
    """
    weights = ((scores - scores.amax(-1, keepdim=True)) / how.temperature).exp()
    if 0 < how.top_k < scores.shape[-1]:
        weights = weights.where(scores >= scores.topk(how.top_k).values[:, -1:], 0.0)
    if how.top_p < 1.0:
        falling = weights.sort(descending=True).values
        mass = falling.cumsum(-1)
        last = (mass < how.top_p * mass[:, -1:]).sum(-1, keepdim=True)  # place of the last one kept
        weights = weights.where(weights >= falling.gather(-1, last), 0.0)
    if how.min_p > 0.0:
        weights = weights.where(weights >= how.min_p, 0.0)
    return weights


def draws(seeds: Tensor, sequence_ids: Tensor, steps: Tensor) -> Tensor:
    """Draws a number of 53 random bits for each sequence.

    A sequence gets the same draws alone and in any batch: each is a Philox number of a key and a
    counter of its own.

    Args:
        seeds: (n,) int64, the keys.
        sequence_ids: (n,) int64, tell sequences with the same seed apart.
        steps: (n,) int64, how many tokens each sequence has drawn before.

    Returns:
        (n,) float64 in [0, 1).
    """
    high, low, _, _ = philox((steps, sequence_ids, 0, SAMPLING_STREAM), seeds)
    return ((high << 21) + (low >> 11)).double() * 2.0**-53


def top_logprobs(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Lists the `count` likeliest tokens of each row of (n, V), likeliest first, ties by token id.

    Returns:
        Per row, pairs of a token and its log-probability.
    """
    found = logprobs.sort(descending=True, stable=True)
    rows = found.indices[:, :count].tolist(), found.values[:, :count].tolist()
    return [list(zip(tokens, values, strict=True)) for tokens, values in zip(*rows, strict=True)]
