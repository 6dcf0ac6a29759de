"""Generation for any mix of prompts: a KV-cache in the window, an exact sliding window past it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gptfast.checks import check_count, is_iterable, whole
from gptfast.errors import ConfigError, DataError
from gptfast.generation.engine import Engine, PackedModel, packed_for
from gptfast.generation.mergeable import engine_oddity
from gptfast.generation.reference_loop import ReferenceLoop
from gptfast.generation.request import (
    GIB,
    Loop,
    Prompt,
    Request,
    Update,
    check_dtype,
    check_tokenizer,
    encode,
    seeds_of,
    stops_of,
    window_stride,
    written,
)
from gptfast.model import GPT
from gptfast.ops import select
from gptfast.ops.sampling import Sampling
from gptfast.tokenizer import CharTokenizer

FinishReason = Literal["length", "stop", "window", "interrupted"]
Piece = str | list[int]
INTERRUPT_SECONDS = 0.1  # how long the engine may run before Python looks for Ctrl-C
STREAM_SECONDS = 0.005  # what is generated in so long comes in one piece


@dataclass
class Generation:
    """What was generated for one prompt, without the prompt and without the stop that ended it."""

    text: str | None  # None without a tokenizer
    tokens: list[int]
    logprobs: list[float]  # of each token under the model, before temperature and filters
    finish_reason: FinishReason  # "window": overflow="stop" met the end of the window
    # per token, the likeliest ones and their log-probabilities; empty unless asked for
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)


def generate(
    model: GPT | PackedModel,
    prompts: Sequence[Prompt],
    *,
    tokenizer: CharTokenizer | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | int | Sequence[str | int] | None = None,
    num_samples: int = 1,
    overflow: str = "recompute",
    logprobs: int = 0,
    max_batch: int = 256,
    max_cache_bytes: int = 4 * GIB,
    dtype: str | None = None,
) -> list[Generation]:
    """Continues every prompt; by the kernels, its result has the same bits whatever the others.

    Ctrl-C ends the call early: what there is comes back, with the finish reason "interrupted".

    Args:
        model: The GPT, whose `backend` chooses between the engine and the uncached plain torch
            loop; or what `gptfast.pack` made of it. The engine knows plain layers alone: with
            others (adapters, hooks), "auto" takes the uncached loop and warns.
        prompts: Texts (with `tokenizer`) or token lists, of any mix of lengths, none of them empty.
        tokenizer: Encodes prompts and decodes results.
        max_new_tokens: Tokens to generate per prompt.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens only, from all when 0. This and the next two keep
            tokens that tie with the last one kept.
        top_p: Draw from the likeliest tokens only that together have this probability
            (arXiv:1904.09751), after top_k.
        min_p: Draw only tokens with at least this fraction of the likeliest one's probability
            (arXiv:2407.01082).
        repetition_penalty: Divides the positive logits, and multiplies the others, of tokens in the
            prompt or generated before (arXiv:1909.05858).
        seed: One int in [0, 2**63) (a sample's draws then depend on its place in the result), or
            one per prompt.
        stop: Strings or token ids that end a text; they are not part of the result.
        num_samples: Results per prompt, one after the other; they share the prompt's computation.
        overflow: What happens past `block_size` tokens, positions being absolute: "recompute"
            slides the window by one and computes it again, exactly as without a cache; "stride:K"
            drops K tokens at a time, which computes less; "stop" ends the text; "error" refuses
            before any work.
        logprobs: How many of the likeliest tokens to report beside each token that was taken.
        max_batch: Texts in work at once; the others wait for one to end. Results do not depend on
            it, nor on the next one.
        max_cache_bytes: Memory for keys and values.
        dtype: "fp32" or "bf16" for weights, activations and cache, "int8" for weights of 8 bits
            with a scale per output, whose activations are rounded to 16 bits where the processor
            multiplies bytes (VNNI); the model's own when None. With "int8", activations and cache
            are bf16 where the processor multiplies bf16, else float32.

    Returns:
        `num_samples` Generations per prompt, in order; tokens and text are the new ones alone.

    Raises:
        ConfigError: An option is wrong, or one text alone needs more cache than there may be.
        DataError: A prompt is empty, has an unknown character or token, or does not fit
            (overflow="error"); or the model's logits are not finite.
        BackendError: `model.backend` is "fused" and the kernels cannot run, or do not know one of
            the model's modules.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "prompts")}
    request = make_request(model, prompts, **options)
    loop = _loop(model, request)
    try:
        while loop.run(INTERRUPT_SECONDS):
            pass
    except KeyboardInterrupt:
        pass  # what is unfinished says so
    return [_generation(update, request) for update in loop.updates()]


def stream(
    model: GPT | PackedModel, prompt: Prompt | Sequence[Prompt], **options: Any
) -> Iterator[Piece] | Iterator[tuple[int, Piece]]:
    """Continues one prompt or several and yields what is new, at the speed of `generate`.

    A piece appears when it is sure not to be part of a stop; what is generated within a few
    milliseconds is one piece. Changes of the model between two pieces do not reach the call.

    Args:
        model: As for `generate`.
        prompt: A text (with `tokenizer`) or a token list; or a list of either, for which an empty
            one yields nothing.
        **options: Those of `generate`.

    Yields:
        For one prompt pieces of text with a tokenizer, else lists of tokens; together they are what
        `generate` returns. For several, pairs of a place in what `generate` returns and a piece.

    Raises:
        As `generate`, at the call.
    """
    known = generate.__kwdefaults__ or {}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"stream() has no option {unknown[0]!r}; it has {', '.join(known)}")
    listed = not isinstance(prompt, str) and is_iterable(prompt)
    given: Any = list(prompt) if listed else prompt
    several = listed and (not given or any(whole(each) is None for each in given))
    count = options.get("num_samples", 1)
    if not several and count != 1:
        raise ConfigError(
            f"num_samples must be 1 for a single prompt (wrap it in a list for more), got {count!r}"
        )
    request = make_request(model, given if several else [given], **options)
    pieces = _pieces(_loop(model, request, lasting=True), request)
    return pieces if several else (piece for _, piece in pieces)


def make_request(model: GPT | PackedModel, prompts: Sequence[Prompt], **options: Any) -> Request:
    """The checked request of a call of `generate` with these options."""
    return _request(model, prompts, **((generate.__kwdefaults__ or {}) | options))


def _request(
    model: GPT | PackedModel,
    prompts: Sequence[Prompt],
    *,
    tokenizer: CharTokenizer | None,
    max_new_tokens: int,
    seed: int | Sequence[int],
    stop: str | int | Sequence[str | int] | None,
    num_samples: int,
    overflow: str,
    logprobs: int,
    max_batch: int,
    max_cache_bytes: int,
    dtype: str | None,
    **sampling: Any,
) -> Request:
    config = model.config
    stride = window_stride(overflow, config.block_size)
    max_new_tokens = check_count("max_new_tokens", max_new_tokens, 0)
    num_samples = check_count("num_samples", num_samples, 1)
    logprobs = check_count("logprobs", logprobs, 0)
    max_batch = check_count("max_batch", max_batch, 1)
    max_cache_bytes = check_count("max_cache_bytes", max_cache_bytes, 1, most=2**62)
    check_dtype(dtype)
    check_tokenizer(tokenizer, config)
    stop_tokens, stop_strings = stops_of(stop, tokenizer is not None, config.vocab_size)
    encoded = encode("prompt", prompts, tokenizer, config.vocab_size)
    for i, tokens in enumerate(encoded):
        needed = len(tokens) + max(max_new_tokens - 1, 0)
        if overflow == "error" and needed > config.block_size:
            raise DataError(
                f"prompt {i} has {len(tokens)} tokens and needs a window of {needed} for"
                f" {max_new_tokens} more,"
                f" but block_size is {config.block_size} (overflow='error')"
            )
    seeds, numbers = seeds_of(seed, len(encoded), num_samples)
    return Request(
        prompts=[tokens for tokens in encoded for _ in range(num_samples)],
        num_samples=num_samples,
        seeds=seeds,
        numbers=numbers,
        sampling=Sampling(**sampling),
        max_new_tokens=max_new_tokens,
        stride=stride,
        alternatives=min(logprobs, config.vocab_size),
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        pieces=written(tokenizer, config.vocab_size),
        max_batch=max_batch,
        max_cache_bytes=max_cache_bytes,
        dtype=dtype,
    )


def _loop(model: GPT | PackedModel, request: Request, lasting: bool = False) -> Loop:
    """What generates the request; `lasting`: by the model as it is now, whatever happens to it."""
    packed = packed_for("generate", model, request.dtype, lasting)
    if packed is not None:
        return Engine(packed, request)
    assert not isinstance(model, PackedModel)
    weight, on_kernels = model.main_weight, model.backend != "reference"
    if (
        weight.is_cuda
        and on_kernels
        and not select.unavailable("cuda", weight.dtype, model.config.head_dim)
        and engine_oddity(model) is None
    ):
        from gptfast.generation.device_loop import DeviceLoop  # needs Triton

        return DeviceLoop(model, request, lasting)
    return ReferenceLoop(model, request)


def _generation(own: Update, request: Request) -> Generation:
    text = None
    if request.pieces is not None:
        text = "".join(request.pieces[token] for token in own.tokens)
        end = _stop_place(text, own.state, request)
        while len(text) > end:  # takes back what wrote the stop
            text = text[: len(text) - len(request.pieces[own.tokens.pop()])]
    kept = len(own.tokens)
    reason: Any = "interrupted" if own.state in ("waiting", "running") else own.state
    return Generation(text, own.tokens, own.logprobs[:kept], reason, own.alternatives[:kept])


def _stop_place(text: str, state: str, request: Request) -> int:
    """Where the first stop string starts; the text's length where none ended it."""
    if state != "stop":
        return len(text)
    places = (text.find(stop) for stop in request.stop_strings)
    return min((place for place in places if place >= 0), default=len(text))


class _Shown:
    """How much of one sequence has been yielded."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._text = ""  # that has been read and not yielded

    def news(self, recent: Update) -> Piece:
        """What is new; what may become a stop waits."""
        request = self._request
        if request.pieces is None:
            return recent.tokens
        text = self._text + "".join(request.pieces[token] for token in recent.tokens)
        end = _stop_place(text, recent.state, request)
        if recent.state in ("waiting", "running"):
            starts = (stop[:n] for stop in request.stop_strings for n in range(1, len(stop)))
            end -= max((len(start) for start in starts if text.endswith(start)), default=0)
        self._text = text[end:]
        return text[:end]


def _pieces(loop: Loop, request: Request) -> Iterator[tuple[int, Piece]]:
    shown = [_Shown(request) for _ in request.prompts]
    more, seconds = True, 0.0  # the first token comes alone
    while more:
        more = loop.run(seconds)
        seconds = STREAM_SECONDS
        for update in loop.updates():
            piece = shown[update.sequence].news(update)
            if piece:
                yield update.sequence, piece
