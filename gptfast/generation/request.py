"""What is to be generated, checked: the input of every loop."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from gptfast.checks import SEEDS, as_int, check_seed, is_iterable
from gptfast.config import GPTConfig
from gptfast.errors import ConfigError, DataError
from gptfast.ops.sampling import Sampling
from gptfast.tokenizer import Tokenizer, check_is_tokenizer

Prompt = str | Sequence[int]
DTYPES = ("bf16", "fp32", "int8")
GIB = 1 << 30
MAX_BATCH = 256  # sequences at once where nothing else is asked for; a GPU's kernels take more


class Request(NamedTuple):
    """The sequences to continue, and how.

    The first three lists have an item per sequence; the `num_samples` sequences of a prompt follow
    one another.
    """

    prompts: list[list[int]]
    seeds: list[int]  # keys of the random draws
    sequence_ids: list[int]  # tell the draws of sequences with the same seed apart
    num_samples: int
    sampling: Sampling
    max_new_tokens: int
    stride: int | None  # how many tokens a full window drops; None: the sequence ends there
    top_logprobs: int  # how many of the likeliest tokens to report per token
    stop_tokens: list[int]
    end_token: int | None  # the tokenizer's, which ends a text as well; None: none does
    stop_strings: list[bytes]
    pieces: list[bytes] | None  # what each token id writes; None without a tokenizer
    decoder: Callable[[], codecs.IncrementalDecoder]  # makes a decoder of those bytes
    max_batch: int | None  # None: as many as suit the device
    max_cache_bytes: int
    dtype: str | None  # None: the model's own


def not_finite(name: str, i: int) -> DataError:
    """Makes the error that the logits of prompt or text number i (its `name`) are not finite."""
    return DataError(f"the model's logits are not finite for {name} {i}")


def slots_at_once(
    request: Request, most: int, capacity: int, slot_bytes: int, used_bytes: int = 0
) -> int:
    """Computes how many sequences run at once.

    Args:
        request: Limits them by `max_batch` and `max_cache_bytes`.
        most: The most that suits the device, if there is no `max_batch`.
        capacity: Tokens that a slot of the cache can hold.
        slot_bytes: Bytes of a slot.
        used_bytes: Bytes of `max_cache_bytes` that something else takes.

    Raises:
        ConfigError: The memory does not hold one sequence.
    """
    left, sequences = request.max_cache_bytes - used_bytes, len(request.prompts)
    if sequences and left < slot_bytes:
        raise ConfigError(
            f"max_cache_bytes must hold one sequence of {capacity} tokens, {slot_bytes} bytes,"
            f" got {request.max_cache_bytes}"
        )
    return min(sequences, request.max_batch or most, left // max(1, slot_bytes))


def window_stride(overflow: str, block_size: int) -> int | None:
    """Parses the option `overflow`: how many tokens a full window drops, None where it never moves.

    Raises:
        ConfigError: `overflow` is none of the values that `generate` lists.
    """
    if overflow == "recompute":
        return 1
    if overflow in ("stop", "error"):
        return None
    head, _, count = str(overflow).partition(":")
    count = count.lstrip("0")
    short = len(count) <= len(str(block_size))  # of too many digits Python makes no number
    if head == "stride" and count.isdecimal() and short and 0 < int(count) <= block_size:
        return int(count)
    raise ConfigError(
        "overflow must be 'recompute', 'stride:K' with K from 1 to block_size, 'stop' or 'error',"
        f" got {overflow!r}"
    )


def check_dtype(dtype: str | None) -> None:
    """Raises ConfigError where there is no such dtype to generate or score in."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")


def check_tokenizer(tokenizer: Tokenizer | None, config: GPTConfig) -> None:
    """Raises ConfigError where the tokenizer has ids that the model does not have."""
    check_is_tokenizer(tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they"
            " do not belong together"
        )


def encode(
    name: str, texts: Sequence[Prompt], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """Encodes texts, and checks lists of token ids.

    Args:
        name: What one of the texts is called in errors, "prompt" or "text".
        texts: Texts or token lists.
        tokenizer: Encodes the texts; None where all of them are token lists.
        vocab_size: How many ids the model has.

    Raises:
        ConfigError: `texts` is no list of texts and token lists, or a text has no tokenizer.
        DataError: A text is empty, or has an unknown character or token.
    """
    if isinstance(texts, str):
        raise ConfigError(f"{name}s must be a list of {name}s, got one str; wrap it in a list")
    if not is_iterable(texts):
        raise ConfigError(f"{name}s must be a list of {name}s, got {texts!r}")
    given: list[Any] = list(texts)  # an iterator gives them once
    if _all_ids(given, vocab_size):
        return [ids.copy() for ids in given]
    by_character = tokenizer is not None and tokenizer.unit == "character"
    if tokenizer is not None and by_character and set(map(type, given)) == {str} and all(given):
        with suppress(DataError):  # the loop below raises one that names the text
            ids, ends = tokenizer.encode("".join(given)), [0, *accumulate(map(len, given))]
            return [ids[start:end] for start, end in pairwise(ends)]
    encoded = []
    for i, text in enumerate(given):
        if isinstance(text, str):
            if tokenizer is None:
                raise ConfigError(f"{name}s given as text need a tokenizer")
            tokens = tokenizer.encode(text)
            if not tokens and name == "prompt" and tokenizer.end_of_text is not None:
                tokens = [tokenizer.end_of_text]  # a new text begins after it
        elif is_iterable(text) and not isinstance(text, bytes | bytearray):
            tokens = _tokens(name, i, text, vocab_size)
        else:
            raise ConfigError(f"{name} {i} must be a text or a list of token ids, got {text!r}")
        if not tokens:
            raise DataError(f"{name} {i} is empty; a {name} needs at least one token")
        encoded.append(tokens)
    return encoded


def _all_ids(texts: list[Any], vocab_size: int) -> bool:
    """Whether these are non-empty lists of token ids. Fast, but does not say what is wrong."""
    if set(map(type, texts)) != {list} or not all(texts):
        return False
    ids = list(chain.from_iterable(texts))
    if [*map(type, ids)].count(int) != len(ids):
        return False
    distinct = set(ids)
    return min(distinct) >= 0 and max(distinct) < vocab_size


def _tokens(name: str, i: int, ids: Iterable[Any], vocab_size: int) -> list[int]:
    given = list(ids)
    if _all_ids([given], vocab_size):
        return given
    found = []
    for token in given:
        value = as_int(token)
        if value is None or not 0 <= value < vocab_size:
            raise DataError(f"{name} {i} has token id {token!r}, which is not in [0, {vocab_size})")
        found.append(value)
    return found


def stops_of(stop: Any, has_text: bool, vocab_size: int) -> tuple[list[int], list[bytes]]:
    """Splits the option `stop` into token ids and strings, as UTF-8.

    Raises:
        ConfigError: A stop is neither a token id nor, where there is a tokenizer, a string.
    """
    if stop is None:
        return [], []
    one = isinstance(stop, str | bytes | bytearray) or not is_iterable(stop)
    stops = [stop] if one else list(stop)
    tokens, strings = [], []
    for each in stops:
        token = as_int(each)
        if isinstance(each, str) and each and has_text:
            strings.append(each.encode("utf-8", "surrogatepass"))
        elif token is not None and 0 <= token < vocab_size:
            tokens.append(token)
        else:
            raise ConfigError(
                "stop must be non-empty strings (with a tokenizer) or token ids in"
                f" [0, {vocab_size}), got {each!r}"
            )
    return tokens, strings


def pieces_of(tokenizer: Tokenizer | None, vocab_size: int) -> list[bytes] | None:
    """Lists what each token id writes: nothing, for those that only the model has."""
    if tokenizer is None:
        return None
    known = tokenizer.pieces
    return known + [b""] * (vocab_size - len(known))


def seeds_of(
    seed: int | Sequence[int], prompts: int, num_samples: int
) -> tuple[list[int], list[int]]:
    """Returns the seeds and the ids of all sequences: `Request.seeds`, `Request.sequence_ids`.

    With one seed, ids count all sequences; with a seed per prompt, they count a prompt's samples.

    Raises:
        ConfigError: `seed` is neither one int nor one per prompt, or a seed is out of range.
    """
    if as_int(seed) is not None:
        count = prompts * num_samples
        return [check_seed(seed)] * count, list(range(count))
    given: list[Any] = list(seed) if is_iterable(seed) else [seed]
    plain = set(map(type, given)) == {int}
    wrong = [] if plain else [each for each in given if as_int(each) is None]
    if wrong:
        raise ConfigError(f"seed must be one int or one per prompt ({prompts}), got {wrong[0]!r}")
    if len(given) != prompts:
        raise ConfigError(
            f"seed must be one int or one per prompt ({prompts}), got {len(given)} seeds"
        )
    if not plain or min(given) < 0 or max(given) >= SEEDS:
        given = [*map(check_seed, given)]
    seeds = [each for each in given for _ in range(num_samples)]
    return seeds, [*range(num_samples)] * prompts
