"""What is to be generated, checked: the input of the engine and of the reference loop."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gptfast.checks import check_seed, is_iterable, whole
from gptfast.config import GPTConfig
from gptfast.errors import ConfigError, DataError
from gptfast.ops.sampling import Sampling
from gptfast.tokenizer import CharTokenizer

Prompt = str | Sequence[int]
DTYPES = ("bf16", "fp32", "int8")
GIB = 1 << 30


class Request(NamedTuple):
    """Sequences to continue and how. Sequence i draws with key `seeds[i]` and number `numbers[i]`.

    `num_samples` sequences of one prompt follow one another.
    """

    prompts: list[list[int]]
    num_samples: int
    seeds: list[int]
    numbers: list[int]
    sampling: Sampling
    max_new_tokens: int
    stride: int | None  # how far a full window moves; None: it does not
    alternatives: int
    stop_tokens: list[int]
    stop_strings: list[str]
    pieces: list[str] | None  # what each token writes
    max_batch: int
    max_cache_bytes: int
    dtype: str | None


@dataclass
class Update:
    """What is new of one sequence; a stop string still ends it, a stop token does not."""

    sequence: int
    state: str  # waiting, running, or why it ended: length, stop, window, invalid (an error)
    tokens: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]


class Loop(Protocol):
    """What generates a request."""

    def run(self, seconds: float) -> bool:
        """Generates for about so long, one step at least; whether there is more to do."""
        ...

    def updates(self) -> list[Update]:
        """What is new since the last call, of all sequences at first, then of those with any."""
        ...


def not_finite(name: str, i: int) -> DataError:
    """The error that the model gives no numbers for text number i; `name` is what it is."""
    return DataError(f"the model's logits are not finite for {name} {i}")


def slots_at_once(
    request: Request, sequences: int, capacity: int, slot_bytes: int, used_bytes: int = 0
) -> int:
    """How many sequences may run at once, of `capacity` tokens and so many bytes of cache each.

    Raises:
        ConfigError: The memory does not hold one.
    """
    left = request.max_cache_bytes - used_bytes
    if sequences and left < slot_bytes:
        raise ConfigError(
            f"max_cache_bytes must hold one sequence of {capacity} tokens, {slot_bytes} bytes,"
            f" got {request.max_cache_bytes}"
        )
    return min(sequences, request.max_batch, left // max(1, slot_bytes))


def window_stride(overflow: str, block_size: int) -> int | None:
    """How many tokens the window drops when it is full; None where it does not move."""
    if overflow == "recompute":
        return 1
    if overflow in ("stop", "error"):
        return None
    head, _, count = str(overflow).partition(":")
    if head == "stride" and count.isdecimal() and 0 < int(count) <= block_size:
        return int(count)
    raise ConfigError(
        "overflow must be 'recompute', 'stride:K' with K from 1 to block_size, 'stop' or 'error',"
        f" got {overflow!r}"
    )


def check_dtype(dtype: str | None) -> None:
    """Checks the name of a dtype to generate or score in."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")


def check_tokenizer(tokenizer: CharTokenizer | None, config: GPTConfig) -> None:
    """Checks that the model has all of the tokenizer's ids."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they"
            " do not belong together"
        )


def encode(
    name: str, texts: Sequence[Prompt], tokenizer: CharTokenizer | None, vocab_size: int
) -> list[list[int]]:
    """The ids of texts, or of lists of ids, in the vocabulary; `name` is what one of them is."""
    if isinstance(texts, str):
        raise ConfigError(f"{name}s must be a list of {name}s, got one str; wrap it in a list")
    if not is_iterable(texts):
        raise ConfigError(f"{name}s must be a list of {name}s, got {texts!r}")
    encoded = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ConfigError(f"{name}s given as text need a tokenizer")
            tokens = tokenizer.encode(text)
        elif is_iterable(text) and not isinstance(text, bytes | bytearray):
            tokens = _tokens(name, i, text, vocab_size)
        else:
            raise ConfigError(f"{name} {i} must be a text or a list of token ids, got {text!r}")
        if not tokens:
            raise DataError(f"{name} {i} is empty; a {name} needs at least one token")
        encoded.append(tokens)
    return encoded


def _tokens(name: str, i: int, ids: Iterable[Any], vocab_size: int) -> list[int]:
    given = list(ids)
    if set(map(type, given)) == {int} and min(given) >= 0 and max(given) < vocab_size:
        return given  # ten times quicker than one by one
    found = []
    for token in given:
        value = whole(token)
        if value is None or not 0 <= value < vocab_size:
            raise DataError(f"{name} {i} has token id {token!r}, which is not in [0, {vocab_size})")
        found.append(value)
    return found


def stops_of(stop: Any, has_text: bool, vocab_size: int) -> tuple[list[int], list[str]]:
    """The token ids and the strings that end a text."""
    if stop is None:
        return [], []
    one = isinstance(stop, str | bytes | bytearray) or not is_iterable(stop)
    stops = [stop] if one else list(stop)
    tokens, strings = [], []
    for each in stops:
        token = whole(each)
        if isinstance(each, str) and each and has_text:
            strings.append(each)
        elif token is not None and 0 <= token < vocab_size:
            tokens.append(token)
        else:
            raise ConfigError(
                "stop must be non-empty strings (with a tokenizer) or token ids in"
                f" [0, {vocab_size}), got {each!r}"
            )
    return tokens, strings


def written(tokenizer: CharTokenizer | None, vocab_size: int) -> list[str] | None:
    """What each token writes; ids that the model has and the tokenizer has not write nothing."""
    if tokenizer is None:
        return None
    known = tokenizer.pieces
    return known + [""] * (vocab_size - len(known))


def seeds_of(
    seed: int | Sequence[int], prompts: int, num_samples: int
) -> tuple[list[int], list[int]]:
    """Keys and numbers of the draws: with one seed for all, the place in the list is the number."""
    if whole(seed) is not None:
        count = prompts * num_samples
        return [check_seed(seed)] * count, list(range(count))
    given: list[Any] = list(seed) if is_iterable(seed) else [seed]
    wrong = [each for each in given if whole(each) is None]
    if wrong:
        raise ConfigError(f"seed must be one int or one per prompt ({prompts}), got {wrong[0]!r}")
    if len(given) != prompts:
        raise ConfigError(
            f"seed must be one int or one per prompt ({prompts}), got {len(given)} seeds"
        )
    keys = [key for key in map(check_seed, given) for _ in range(num_samples)]
    return keys, [*range(num_samples)] * prompts
