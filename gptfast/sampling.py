"""From logits to tokens: temperature, top-k, draws that depend on (seed, sequence, step) alone."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast.errors import ConfigError
from gptfast.ops.random import WORD, philox

SAMPLING_STREAM = WORD  # apart from every dropout's stream
STEPS_AT_ONCE = 64  # that many draws in one go cost little more than one


class Sampler:
    """Chooses the next token of each sequence.

    A draw is a Philox number with key `seed` and counter (step, sequence), so a sequence gets the
    same draws alone and in any batch. With one seed for all prompts a sequence is its place in the
    list; with a seed per prompt it is 0.
    """

    def __init__(
        self, sequences: int, *, temperature: float, top_k: int | None, seed: int | Sequence[int]
    ) -> None:
        if not temperature >= 0.0:
            raise ConfigError(f"temperature must be 0 (greedy) or positive, got {temperature!r}")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ConfigError(f"top_k must be None or a positive whole number, got {top_k!r}")
        shared = isinstance(seed, int)
        seeds = [seed] * sequences if isinstance(seed, int) else list(seed)
        if len(seeds) != sequences:
            raise ConfigError(
                f"seed must be one int or one per prompt ({sequences}), got {len(seeds)}"
            )
        self.temperature, self.top_k = temperature, top_k
        self._keys = torch.tensor([each & (2**63 - 1) for each in seeds], dtype=torch.int64)
        self._sequence = (
            torch.arange(sequences) if shared else torch.zeros(sequences, dtype=torch.int64)
        )

        self._block, self._uniforms = -1, torch.empty(0)

    def part(self, first: int, last: int) -> "Sampler":
        """The sampler of sequences first .. last - 1, which count from 0 in it."""
        part = copy.copy(self)
        part._keys, part._sequence = self._keys[first:last], self._sequence[first:last]
        part._block = -1  # what is kept of the draws is of other sequences
        return part

    def __call__(self, logits: Tensor, sequences: Tensor, step: int) -> Tensor:
        """Chooses a token per row.

        Args:
            logits: (n, V) float.
            sequences: (n,) int64, which sequence each row belongs to.
            step: Number of the token since the prompt.

        Returns:
            (n,) int64.
        """
        if self.temperature == 0.0:
            return logits.argmax(-1)
        scaled = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            lowest = scaled.topk(self.top_k).values[:, -1:]  # (n, 1)
            scaled = scaled.masked_fill(scaled < lowest, -torch.inf)
        cumulative = scaled.softmax(-1).cumsum(-1)  # (n, V)
        # The first token whose cumulative probability exceeds the draw; one without probability
        # never does.
        target = self._draws(step)[sequences, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1)

    def _draws(self, step: int) -> Tensor:
        """A number in [0, 1) of 53 bits for each sequence, (sequences,) float64."""
        block, within = divmod(step, STEPS_AT_ONCE)
        if block != self._block:
            steps = torch.arange(block * STEPS_AT_ONCE, (block + 1) * STEPS_AT_ONCE)
            counter = (steps, self._sequence[:, None], 0, SAMPLING_STREAM)
            high, low, _, _ = philox(counter, self._keys[:, None])  # (sequences, steps) each
            self._block = block
            self._uniforms = ((high << 21) + (low >> 11)).double() * 2.0**-53
        return self._uniforms[:, within]
