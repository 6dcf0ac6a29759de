"""Generation for any mix of prompts: a KV-cache in the window, an exact sliding window past it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gptfast.decoder import Batch, make_decoder, window_stride
from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT
from gptfast.sampling import Sampler
from gptfast.tokenizer import CharTokenizer

ROWS_AT_ONCE = 256  # bounds the cache; results do not depend on it
FinishReason = Literal["length", "stop", "window"]
Prompt = str | Sequence[int]


@dataclass
class Generation:
    """What was generated for one prompt, without the prompt and without the stop that ended it."""

    text: str | None  # None without a tokenizer
    tokens: list[int]
    logprobs: list[float]  # of each token under the model, before temperature and top-k
    finish_reason: FinishReason  # "window": overflow="stop" met the end of the window


class _Output:
    """One sequence's tokens and text, and whether a stop has come."""

    def __init__(self, tokenizer: CharTokenizer | None, stops: Sequence[str | int]) -> None:
        self._tokenizer = tokenizer
        self._stop_tokens = {each for each in stops if isinstance(each, int)}
        self._stop_strings = [each for each in stops if isinstance(each, str)]
        self._shown = 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int, logprob: float) -> None:
        """Takes the next token; where it completes a stop, cuts that off and sets `stopped`."""
        self.stopped = token in self._stop_tokens
        if self.stopped:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._tokenizer is None:
            return
        before = len(self.text)
        self.text += self._tokenizer.decode([token])
        found = [
            self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop_strings
        ]
        places = [place for place in found if place >= 0]
        if places:
            self.stopped = True
            self._cut(min(places))

    def _cut(self, length: int) -> None:
        """Takes back the text past `length`, and the tokens that wrote it."""
        assert self._tokenizer is not None
        while len(self.text) > length:
            self.text = self.text[
                : len(self.text) - len(self._tokenizer.decode([self.tokens.pop()]))
            ]
            self.logprobs.pop()

    def news(self, last: bool) -> str | list[int]:
        """What is new since the last call, but for an end that may yet become a stop."""
        shown: str | list[int] = self.tokens if self._tokenizer is None else self.text
        end = len(shown)
        if not (last or self.stopped) and isinstance(shown, str):
            starts = (stop[:n] for stop in self._stop_strings for n in range(1, len(stop)))
            end -= max((len(start) for start in starts if shown.endswith(start)), default=0)
        news = shown[self._shown : end]
        self._shown = max(self._shown, end)
        return news


@dataclass
class _Request:
    """Checked arguments of `generate` and `stream`."""

    prompts: list[list[int]]
    outputs: list[_Output]
    sampler: Sampler
    max_new_tokens: int
    stride: int | None
    dtype: str | None

    def finish_reason(self, i: int) -> FinishReason:
        if self.outputs[i].stopped:
            return "stop"
        return "length" if len(self.outputs[i].tokens) == self.max_new_tokens else "window"


def _request(
    model: GPT,
    prompts: Sequence[Prompt],
    tokenizer: CharTokenizer | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | Sequence[int],
    stop: str | int | Sequence[str | int] | None,
    overflow: str,
    dtype: str | None,
) -> _Request:
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ConfigError(
            f"max_new_tokens must be a whole number from 0 on, got {max_new_tokens!r}"
        )
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list of prompts, got one str; wrap it in a list")
    config, stride = model.config, window_stride(overflow)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they"
            " do not belong together"
        )
    stops = [] if stop is None else [stop] if isinstance(stop, str | int) else list(stop)
    for each in stops:
        if each == "" or (isinstance(each, str) and tokenizer is None):
            raise ConfigError(
                f"stop must be non-empty strings (with a tokenizer) or token ids, got {each!r}"
            )
    encoded = [_encode(i, prompt, tokenizer, config.vocab_size) for i, prompt in enumerate(prompts)]
    for i, tokens in enumerate(encoded):
        needed = len(tokens) + max(max_new_tokens - 1, 0)
        if overflow == "error" and needed > config.block_size:
            raise DataError(
                f"prompt {i} has {len(tokens)} tokens and needs a window of {needed} for"
                f" {max_new_tokens} more,"
                f" but block_size is {config.block_size} (overflow='error')"
            )
    sampler = Sampler(len(encoded), temperature=temperature, top_k=top_k, seed=seed)
    outputs = [_Output(tokenizer, stops) for _ in encoded]
    return _Request(encoded, outputs, sampler, max_new_tokens, stride, dtype)


def _encode(i: int, prompt: Prompt, tokenizer: CharTokenizer | None, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("prompts given as text need a tokenizer")
        tokens = tokenizer.encode(prompt)
    else:
        tokens = [int(token) for token in prompt]
    if not tokens:
        raise DataError(f"prompt {i} is empty; a prompt needs at least one token")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise DataError(f"prompt {i} has token id {token}, which is not in [0, {vocab_size})")
    return tokens


@torch.no_grad()
def _run(model: GPT, request: _Request, first: int, last: int) -> Iterator[None]:
    """Fills the outputs of prompts first .. last - 1, a token each per step."""
    if request.max_new_tokens == 0 or first == last:
        return
    decoder = make_decoder(model, last - first, request.dtype)
    sampler = request.sampler.part(first, last)
    prompts = request.prompts[first:last]
    batch = Batch(decoder, prompts, model.config.block_size, request.max_new_tokens, request.stride)
    for step in range(request.max_new_tokens):
        batch.drop(batch.full())
        if not len(batch.running):
            return
        logits = batch.logits()  # (n, V)
        tokens = sampler(logits, torch.from_numpy(batch.running), step)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).tolist()
        batch.append(tokens.numpy())
        for row, token, logprob in zip(batch.running, tokens.tolist(), logprobs, strict=True):
            request.outputs[first + row].add(token, logprob)
        batch.drop([int(row) for row in batch.running if request.outputs[first + row].stopped])
        yield


def generate(
    model: GPT,
    prompts: Sequence[Prompt],
    *,
    tokenizer: CharTokenizer | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | int | Sequence[str | int] | None = None,
    overflow: str = "recompute",
    dtype: str | None = None,
) -> list[Generation]:
    """Continues every prompt; by the kernels, its result has the same bits whatever the others.

    Args:
        model: The GPT; its `backend` chooses between the kernels and the uncached plain torch loop.
        prompts: Texts (with `tokenizer`) or token lists, of any mix of lengths, none of them empty.
        tokenizer: Encodes prompts and decodes results.
        max_new_tokens: Tokens to generate per prompt.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens only (and those that tie with the last of them).
        seed: One int (a prompt's draws then depend on its place in the list), or one per prompt.
        stop: Strings or token ids that end a text; they are not part of the result.
        overflow: What happens past `block_size` tokens, positions being absolute: "recompute"
            slides the window by one and computes it again, exactly as without a cache; "stride:K"
            drops K tokens at a time, which computes less; "stop" ends the text; "error" refuses
            before any work.
        dtype: "fp32" or "bf16" for weights, activations and cache; the model's own when None.

    Returns:
        One Generation per prompt, in order; tokens and text are the new ones alone.

    Raises:
        ConfigError: An option is wrong.
        DataError: A prompt is empty, has an unknown character or token, or does not fit
            (overflow="error").
        BackendError: `model.backend` is "fused" and the kernels cannot run.
    """
    request = _request(
        model, prompts, tokenizer, max_new_tokens, temperature, top_k, seed, stop, overflow, dtype
    )
    for first in range(0, len(request.prompts), ROWS_AT_ONCE):
        for _ in _run(model, request, first, min(len(request.prompts), first + ROWS_AT_ONCE)):
            pass
    return [
        Generation(
            None if tokenizer is None else output.text,
            output.tokens,
            output.logprobs,
            request.finish_reason(i),
        )
        for i, output in enumerate(request.outputs)
    ]


def stream(
    model: GPT, prompt: Prompt, *, tokenizer: CharTokenizer | None = None, **options: Any
) -> Iterator[str | list[int]]:
    """Continues one prompt and yields what is new as soon as it is sure not to be part of a stop.

    Args:
        model: The GPT.
        prompt: A text (with `tokenizer`) or a token list.
        tokenizer: As for `generate`.
        **options: Those of `generate`.

    Yields:
        Pieces of text with a tokenizer, else lists of tokens; together they are what `generate`
        returns.

    Raises:
        As `generate`, at the call.
    """
    defaults = {
        name: value
        for name, value in (generate.__kwdefaults__ or {}).items()
        if name != "tokenizer"
    }
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise TypeError(f"stream() has no option {unknown[0]!r}; it has {', '.join(defaults)}")
    request = _request(model, [prompt], tokenizer, **(defaults | options))
    return _pieces(model, request)


def _pieces(model: GPT, request: _Request) -> Iterator[str | list[int]]:
    output = request.outputs[0]
    for _ in _run(model, request, 0, 1):
        news = output.news(last=False)
        if news:
            yield news
    news = output.news(last=True)
    if news:
        yield news
