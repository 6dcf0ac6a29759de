"""What users call to generate: `generate` and `stream`."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, overload

from gptfast.checks import as_int, check_count, is_iterable
from gptfast.errors import ConfigError, DataError
from gptfast.generation.engine import Engine, PackedModel, engine_device, own_model
from gptfast.generation.reference_loop import ReferenceLoop
from gptfast.generation.request import (
    GIB,
    Prompt,
    Request,
    check_dtype,
    check_tokenizer,
    encode,
    pieces_of,
    seeds_of,
    stops_of,
    window_stride,
)
from gptfast.generation.result import Generation
from gptfast.generation.sequences import GenerationLoop, Update
from gptfast.model import GPT
from gptfast.ops.sampling import Sampling
from gptfast.tokenizer import Tokenizer

Piece = str | list[int]
GOING_ON = ("waiting", "running")  # states
INTERRUPT_SECONDS = 0.1  # Python handles Ctrl-C between two runs of so long
STREAM_SECONDS = 0.005  # a run of so long makes one piece of a stream


def generate(
    model: GPT | PackedModel,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | int | Sequence[str | int] | None = None,
    stop_at_end: bool = True,
    num_samples: int = 1,
    overflow: str = "recompute",
    logprobs: int = 0,
    max_batch: int | None = None,
    max_cache_bytes: int = 4 * GIB,
    dtype: str | None = None,
) -> list[Generation]:
    """Continues every prompt; with the kernels, a result has the same bits in any batch.

    Ctrl-C ends the call early: unfinished results have the finish reason "interrupted".

    Args:
        model: The GPT, whose `backend` chooses between the engine and the uncached loop in plain
            torch; or what `gptfast.pack` made of it. The engine computes plain layers alone: with
            others (adapters, hooks), "auto" takes the uncached loop and warns.
        prompts: Texts (with `tokenizer`) or token lists, of any mix of lengths, none of them empty.
            With a tokenizer that has an end of texts, "" begins a new text.
        tokenizer: Encodes prompts and decodes results.
        max_new_tokens: Tokens to generate per prompt.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draws from the k likeliest tokens only; from all when 0 or None. This and the next
            two keep tokens that tie with the last one kept.
        top_p: Draws only from the fewest likeliest tokens that together have this probability
            (arXiv:1904.09751), after top_k; from all when 1 or None.
        min_p: Draws only tokens with at least this fraction of the likeliest one's probability
            (arXiv:2407.01082); from all when 0 or None.
        repetition_penalty: Divides the positive logits, and multiplies the others, of tokens in the
            prompt or generated before (arXiv:1909.05858).
        seed: An int in [0, 2**63), with which the draws of a result depend on its place in the
            list; or one int per prompt.
        stop: Strings or token ids that end a text; they are not part of the result.
        stop_at_end: Whether the tokenizer's end of texts, if it has one, ends a text as well.
        num_samples: Results per prompt, which follow one another; the engine computes the prompt
            once for them.
        overflow: What happens past `block_size` tokens, positions being absolute: "recompute"
            slides the window by one and computes it again, exactly as without a cache; "stride:K"
            drops K tokens at a time, which computes less; "stop" ends the text; "error" refuses
            before any work.
        logprobs: How many of the likeliest tokens to report in `top_logprobs` for each token.
        max_batch: Sequences that run at once; the others wait for one to end. None stands for 256
            on a CPU, and on a GPU for as many as `max_cache_bytes` holds, up to 4096. Results
            depend on neither this nor the next option.
        max_cache_bytes: Bytes for keys and values.
        dtype: "fp32" or "bf16" for weights, activations and cache, "int8" for weights of 8 bits
            with a scale per output, whose activations are rounded to 16 bits where the processor
            multiplies bytes (VNNI); the model's own when None. With "int8", activations and cache
            are bf16 on a GPU and where the processor multiplies bf16, else float32.

    Returns:
        `num_samples` Generations per prompt, in order.

    Raises:
        ConfigError: An option is wrong, or one sequence alone needs more than `max_cache_bytes`.
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
        pass  # the loop still has what it generated
    return _generations(loop.updates(), request)


@overload
def stream(model: GPT | PackedModel, prompt: str, **options: Any) -> Iterator[str]: ...
@overload
def stream(
    model: GPT | PackedModel, prompt: Sequence[int], *, tokenizer: None = None, **options: Any
) -> Iterator[list[int]]: ...
@overload
def stream(
    model: GPT | PackedModel, prompt: Sequence[int], *, tokenizer: Tokenizer, **options: Any
) -> Iterator[str]: ...
@overload
def stream(
    model: GPT | PackedModel,
    prompt: Sequence[Sequence[int]],
    *,
    tokenizer: None = None,
    **options: Any,
) -> Iterator[tuple[int, list[int]]]: ...
@overload
def stream(
    model: GPT | PackedModel, prompt: Sequence[Prompt], *, tokenizer: Tokenizer, **options: Any
) -> Iterator[tuple[int, str]]: ...
def stream(
    model: GPT | PackedModel, prompt: Prompt | Sequence[Prompt], **options: Any
) -> Iterator[Piece] | Iterator[tuple[int, Piece]]:
    """Continues one prompt or several, and yields the results in pieces while they grow.

    A piece holds what a few milliseconds generate, apart from text that may become part of a stop:
    the next piece has it if it does not. Changes of the model between two pieces have no effect.

    Args:
        model: As for `generate`.
        prompt: A text (with `tokenizer`) or a token list; or a list of either, which may be empty.
        **options: Those of `generate`.

    Yields:
        Pieces for one prompt: str with a tokenizer, else list[int]; joined, they are what
        `generate` returns. For several prompts, pairs of an index into the list that `generate`
        returns and a piece.

    Raises:
        TypeError: `generate` has no such option.
        ConfigError, DataError, BackendError: As `generate`, before the first piece; DataError for
            logits that are not finite when it happens.
    """
    known = generate.__kwdefaults__ or {}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"stream() has no option {unknown[0]!r}; it has {', '.join(known)}")
    listed = not isinstance(prompt, str) and is_iterable(prompt)
    given: Any = list(prompt) if listed else prompt
    several = listed and (not given or any(as_int(each) is None for each in given))
    count = options.get("num_samples", 1)
    if not several and as_int(count) != 1:
        raise ConfigError(
            f"num_samples must be 1 for a single prompt (wrap it in a list for more), got {count!r}"
        )
    request = make_request(model, given if several else [given], **options)
    pieces = _pieces(_loop(model, request, lasting=True), request)
    return pieces if several else (piece for _, piece in pieces)


def make_request(model: GPT | PackedModel, prompts: Sequence[Prompt], **options: Any) -> Request:
    """Checks the options of a call of `generate`, which it takes and raises errors for alike."""
    return _request(model, prompts, **((generate.__kwdefaults__ or {}) | options))


def _request(
    model: GPT | PackedModel,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    seed: int | Sequence[int],
    stop: str | int | Sequence[str | int] | None,
    stop_at_end: bool,
    num_samples: int,
    overflow: str,
    logprobs: int,
    max_batch: int | None,
    max_cache_bytes: int,
    dtype: str | None,
    **sampling: Any,
) -> Request:
    config = own_model(model).config
    stride = window_stride(overflow, config.block_size)
    max_new_tokens = check_count("max_new_tokens", max_new_tokens, 0)
    num_samples = check_count("num_samples", num_samples, 1)
    logprobs = check_count("logprobs", logprobs, 0)
    max_batch = None if max_batch is None else check_count("max_batch", max_batch, 1)
    max_cache_bytes = check_count("max_cache_bytes", max_cache_bytes, 1, most=2**62)
    check_dtype(dtype)
    check_tokenizer(tokenizer, config)
    stop_tokens, stop_strings = stops_of(stop, tokenizer is not None, config.vocab_size)
    encoded = encode("prompt", prompts, tokenizer, config.vocab_size)
    for i, tokens in enumerate(encoded if overflow == "error" else ()):
        needed = len(tokens) + max(max_new_tokens - 1, 0)
        if needed > config.block_size:
            raise DataError(
                f"prompt {i} has {len(tokens)} tokens and needs a window of {needed} for"
                f" {max_new_tokens} more,"
                f" but block_size is {config.block_size} (overflow='error')"
            )
    seeds, sequence_ids = seeds_of(seed, len(encoded), num_samples)
    if num_samples > 1:
        encoded = [tokens for tokens in encoded for _ in range(num_samples)]
    return Request(
        prompts=encoded,
        seeds=seeds,
        sequence_ids=sequence_ids,
        num_samples=num_samples,
        sampling=Sampling(**sampling),
        max_new_tokens=max_new_tokens,
        stride=stride,
        top_logprobs=min(logprobs, config.vocab_size),
        stop_tokens=stop_tokens,
        end_token=tokenizer.end_of_text if tokenizer is not None and stop_at_end else None,
        stop_strings=stop_strings,
        pieces=pieces_of(tokenizer, config.vocab_size),
        decoder=codecs.getincrementaldecoder("utf-8") if tokenizer is None else tokenizer.decoder,
        max_batch=max_batch,
        max_cache_bytes=max_cache_bytes,
        dtype=dtype,
    )


def _loop(model: GPT | PackedModel, request: Request, lasting: bool = False) -> GenerationLoop:
    """Chooses the loop; `lasting` says that the model may change before the loop is done."""
    model = own_model(model)
    if isinstance(model, PackedModel):
        model.check_dtype(request.dtype)
        return Engine(model, request)
    device = engine_device("generate", model, request.dtype)
    if device == "cpu":
        return Engine(PackedModel(model, request.dtype, lasting), request)
    if device == "cuda":
        from gptfast.generation.device_loop import DeviceLoop  # imports Triton

        return DeviceLoop(model, request, lasting)
    return ReferenceLoop(model, request)


def _generations(updates: list[Update], request: Request) -> list[Generation]:
    found, decoder = [], request.decoder()
    for _, state, tokens, logprobs, likeliest in updates:
        reason: Any = "interrupted" if state in GOING_ON else state
        text, pieces = None, None
        if request.pieces is not None:
            pieces = [*map(request.pieces.__getitem__, tokens)]
            written = b"".join(pieces)
            end, count = _stop_start(written, state, request), len(tokens)
            text = decoder.decode(written[:end], True)
            start = len(written)
            while start > end:  # drops the tokens that wrote nothing but the stop
                start -= len(pieces[count - 1])
                count -= start >= end
            if start < end < len(written):
                pieces[count - 1] = pieces[count - 1][: end - start]
            if count < len(tokens):
                tokens, logprobs = tokens[:count], logprobs[:count]
                likeliest, pieces = likeliest[:count], pieces[:count]
        found.append(Generation(text, tokens, logprobs, reason, likeliest))
        found[-1].pieces = pieces
    return found


def _stop_start(written: bytes, state: str, request: Request) -> int:
    """Where the first stop string starts; the text's length where none ended it."""
    if state != "stop":
        return len(written)
    starts = (written.find(stop) for stop in request.stop_strings)
    return min((start for start in starts if start >= 0), default=len(written))


class _PendingText:
    """The text of one sequence that was generated and has not been yielded yet."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._written = b""
        self._decoder = request.decoder()

    def next_piece(self, update: Update) -> Piece:
        """Returns what may be yielded; what may become part of a stop or a character waits."""
        request = self._request
        if request.pieces is None:
            return update.tokens
        written = self._written + b"".join(request.pieces[token] for token in update.tokens)
        end, more = _stop_start(written, update.state, request), update.state in GOING_ON
        if more:
            prefixes = (stop[:n] for stop in request.stop_strings for n in range(1, len(stop)))
            end -= max((len(prefix) for prefix in prefixes if written.endswith(prefix)), default=0)
        self._written = written[end:]
        return self._decoder.decode(written[:end], not more)


def _pieces(loop: GenerationLoop, request: Request) -> Iterator[tuple[int, Piece]]:
    pending = [_PendingText(request) for _ in request.prompts]
    more, seconds = True, 0.0  # one step: the first token comes at once
    while more:
        more = loop.run(seconds)
        seconds = STREAM_SECONDS
        for update in loop.updates():
            piece = pending[update.sequence].next_piece(update)
            if piece:
                yield update.sequence, piece
