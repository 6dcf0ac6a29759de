"""Scores how likely a model finds given texts."""

import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gptfast.checks import check_count
from gptfast.encoding import characters_in
from gptfast.generation.engine import PackedModel, engine_device, own_model
from gptfast.generation.request import (
    Prompt,
    check_dtype,
    check_tokenizer,
    encode,
    not_finite,
    pieces_of,
)
from gptfast.generation.snapshot import snapshot
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer

TOKENS_AT_ONCE = 2048  # per call of the engine, bounds its memory; results do not depend on it


@dataclass
class Score:
    """The log-probabilities, in nats, of a text's tokens after the first."""

    tokens: list[int]
    logprobs: list[float]  # of tokens[1:], each given the tokens before it in its window
    characters: int | None  # how many begin in tokens[1:]; None without a tokenizer
    utf8_bytes: int | None  # how many tokens[1:] write; None without a tokenizer

    def __repr__(self) -> str:
        tokens = f"{reprlib.repr(self.tokens)} of {len(self.tokens)}"
        names = ("bits_per_token", "bits_per_character", "bits_per_byte")
        known = {name: getattr(self, name) for name in names}
        bits = "".join(f", {name}={x:.4f}" for name, x in known.items() if x is not None)
        return f"Score(tokens={tokens}, logprob={self.logprob:.4f}{bits})"

    @property
    def logprob(self) -> float:
        """The log-probability, in nats, of all tokens but the first."""
        return math.fsum(self.logprobs)

    @property
    def bits_per_token(self) -> float | None:
        """Mean cross-entropy per token, in bits; None where there is only one token."""
        return bits_per(-self.logprob, len(self.logprobs))

    @property
    def bits_per_character(self) -> float | None:
        """Mean cross-entropy per character, in bits; None without characters or a tokenizer."""
        return bits_per(-self.logprob, self.characters)

    @property
    def bits_per_byte(self) -> float | None:
        """Mean cross-entropy per byte in UTF-8, which compares models of different tokenizers.

        In bits; None without bytes or a tokenizer.
        """
        return bits_per(-self.logprob, self.utf8_bytes)


def bits_per(nats: float, count: int | None) -> float | None:
    """Returns a cross-entropy of so many nats in all as bits per item; None without items."""
    return nats / math.log(2) / count if count else None


class Window(NamedTuple):
    """Tokens first to last - 1 of a text predict first + 1 to last; the last `new` count."""

    first: int
    last: int
    new: int

    @property
    def length(self) -> int:
        """How many tokens it predicts."""
        return self.last - self.first


def windows_of(tokens: int, T: int, stride: int | None) -> Iterator[Window]:
    """Yields the windows that predict the tokens of a text after its first, each of them once.

    Args:
        tokens: How many the text has.
        T: The length of a window; all have it, if the text does.
        stride: How many tokens the window moves, at most T. None: disjoint windows; the last one
            has the rest.
    """
    scored = 0
    while scored < tokens - 1:
        step = T if scored == 0 or stride is None else min(stride, T)
        last = min(tokens - 1, scored + step)
        yield Window(scored if stride is None else max(0, last - T), last, last - scored)
        scored = last


def score(
    model: GPT | PackedModel,
    texts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    stride: int | None = None,
    dtype: str | None = None,
) -> list[Score]:
    """Computes how likely the model finds each token of each text given those before it.

    Args:
        model: The GPT, whose `backend` chooses between the engine and plain torch; or what
            `gptfast.pack` made of it.
        texts: Texts (with `tokenizer`) or token lists, of any mix of lengths, none of them empty.
        tokenizer: Encodes texts.
        stride: How many tokens the window moves along a text that is longer than `block_size`; a
            token past the first window is scored given at least block_size - stride + 1 tokens
            before it. Half of `block_size` when None.
        dtype: As for `generate`.

    Returns:
        One Score per text, in order.

    Raises:
        ConfigError: An option is wrong.
        DataError: A text is empty, or has an unknown character or token; or the model's logits are
            not finite.
        BackendError: `model.backend` is "fused" and the kernels cannot run, or do not know one of
            the model's modules.
    """
    model = own_model(model)
    T = model.config.block_size
    check_dtype(dtype)
    check_tokenizer(tokenizer, model.config)
    stride = check_count("stride", max(1, T // 2) if stride is None else stride, 1)
    encoded = encode("text", texts, tokenizer, model.config.vocab_size)
    logprobs: list[list[float]] = [[] for _ in encoded]
    windows = [
        (i, each) for i, text in enumerate(encoded) for each in windows_of(len(text), T, stride)
    ]
    for (i, window), values in zip(windows, _score(model, encoded, windows, dtype), strict=True):
        if not all(map(math.isfinite, values)):
            raise not_finite("text", i)
        logprobs[i] += values[len(values) - window.new :]
    pieces = pieces_of(tokenizer, model.config.vocab_size)
    scores = []
    for tokens, own in zip(encoded, logprobs, strict=True):
        written = None if pieces is None else b"".join(pieces[token] for token in tokens[1:])
        sizes = (None, None) if written is None else (characters_in(written), len(written))
        scores.append(Score(tokens, own, *sizes))
    return scores


def _score(
    model: GPT | PackedModel,
    texts: list[list[int]],
    windows: list[tuple[int, Window]],  # each with its text's place
    dtype: str | None,
) -> list[list[float]]:
    """Per window, the log-probabilities of all its predictions."""
    if isinstance(model, PackedModel):
        model.check_dtype(dtype)
        packed = model
    elif engine_device("score", model, dtype) == "cpu":
        packed = PackedModel(model, dtype, lasting=False)
    else:
        reference = snapshot(model, dtype)
        return [_reference_scores(reference, texts[i], window) for i, window in windows]
    results: list[list[float]] = [[] for _ in windows]
    for group in _groups([window.length for _, window in windows]):
        chosen = [windows[n] for n in group]
        parts = [texts[i][window.first : window.last + 1] for i, window in chosen]
        for n, own in zip(group, packed.score(parts), strict=True):
            results[n] = own
    return results


def _groups(lengths: list[int]) -> Iterator[list[int]]:
    """Groups windows of similar lengths, as their indices, by what fits into TOKENS_AT_ONCE."""
    group: list[int] = []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[n] > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(n)
    if group:
        yield group


@torch.no_grad()
def _reference_scores(model: GPT, text: list[int], window: Window) -> list[float]:
    device = model.main_weight.device
    idx = torch.tensor([text[window.first : window.last]], device=device)
    targets = torch.tensor(text[window.first + 1 : window.last + 1], device=device)
    logprobs = model(idx)[0].float().log_softmax(-1)  # (T, V)
    return logprobs.gather(-1, targets[:, None])[:, 0].tolist()
