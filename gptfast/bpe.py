"""Byte-pair encoding (arXiv:1508.07909) of bytes, as GPT-2's, by the library `tokenizers`.

Each token is a string of bytes and each byte has a token, so every text can be encoded and comes
back whole, and a token may hold a part of a character. The library, the extra `bpe`, is needed to
encode and to train; a checkpoint is loaded and its texts are decoded without it.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptfast.bpe_files import (
    BYTE_SYMBOLS,
    END_OF_TEXT,
    ENDINGS,
    MOST_IDS,
    Parsed,
    parse,
    read_json,
)
from gptfast.checks import check_count
from gptfast.encoding import Unknown, check_text, checked_ids, unknown_character
from gptfast.errors import ConfigError, DataError

CHARACTERS_AT_ONCE = 1 << 16  # of a long text, which the library needs fifty times the memory of
PARTS_AT_ONCE = 16  # that its threads share

_BOUNDARY = re.compile(r"(?<=\S)[ \n]")  # between two words of GPT-2's pre-tokenization
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class BPETokenizer:
    """A byte-pair encoding of bytes; `train` makes one from texts, `load` reads one.

    What is written like a special token in a text, as "<|endoftext|>", is encoded as the text that
    it is: special tokens come in as ids alone.

    Args:
        json: A tokenizer in the form of `tokenizer.json`.
        ending: The special token that ends a text; None: there is none.

    Raises:
        DataError: `json` is no byte-pair encoding of all bytes, or has no such special token.
    """

    json: str
    ending: str | None = None
    parsed: Parsed = field(init=False, repr=False, compare=False)  # what is in `json`

    unit = "token"
    padding = None

    def __post_init__(self) -> None:
        if not isinstance(self.json, str):
            raise DataError(f"a tokenizer's json must be a str, got a {type(self.json).__name__}")
        parsed = parse(self.json)
        object.__setattr__(self, "json", parsed.canonical)
        object.__setattr__(self, "parsed", parsed)
        if self.ending is not None and not isinstance(self.ending, str):
            raise DataError(f"ending must be a text or None, got {self.ending!r}")
        if self.ending is not None and self.ending not in parsed.special:
            raise DataError(f"the tokenizer has no special token {self.ending!r}")

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size}, end_of_text={self.end_of_text})"

    def __reduce__(self) -> tuple[Any, ...]:
        return BPETokenizer, (self.json, self.ending)

    @classmethod
    def train(
        cls, texts: str | Iterable[str], vocab_size: int, ending: str | None = END_OF_TEXT
    ) -> "BPETokenizer":
        """Learns the most frequent pairs of bytes and tokens, within GPT-2's words.

        The result depends on the arguments alone.

        Args:
            texts: A text or several, which are read one by one.
            vocab_size: How many ids to make at most, those of the 256 bytes included; a short text
                gives fewer.
            ending: The special token that ends a text; None makes none.

        Raises:
            ConfigError: `vocab_size` has no room for the bytes or too much, texts may encode to
                `ending`, or the library is missing.
            DataError: There is no text, or half of a surrogate pair is in one.
        """
        if ending is not None and (not isinstance(ending, str) or _SURROGATE.search(ending)):
            raise ConfigError(f"ending must be a text or None, got {ending!r}")
        size = check_count("vocab_size", vocab_size, 256 + (ending is not None), MOST_IDS)
        library = _library()
        byte_level = library.pre_tokenizers.ByteLevel
        encoder = library.Tokenizer(library.models.BPE())
        encoder.pre_tokenizer = byte_level(add_prefix_space=False)
        encoder.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[] if ending is None else [ending],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        parts = chain.from_iterable(map(_checked_parts, [texts] if type(texts) is str else texts))
        first = next(parts, None)
        if first is None:
            raise DataError("a vocabulary cannot be made from an empty text")
        encoder.train_from_iterator(chain([first], parts), trainer)
        made = cls(encoder.to_str(), ending)
        merged = (left + right for left, right in made.parsed.merges)
        written = {*map(chr, BYTE_SYMBOLS), *merged}  # what texts encode to
        if made.end_of_text in {made.parsed.vocabulary.get(token) for token in written}:
            raise ConfigError(f"ending must be a text that words do not have, got {ending!r}")
        return made

    @classmethod
    def load(cls, source: str | Path, ending: str | None = None) -> "BPETokenizer":
        """Reads a tokenizer from files; downloads nothing.

        Args:
            source: A `tokenizer.json`; a folder with one, or with GPT-2's vocab.json and
                merges.txt; or "gpt2", which stands for such a folder in Hugging Face's cache.
            ending: The special token that ends a text; None takes the first of ENDINGS that there
                is, if any.

        Raises:
            ConfigError: The library is missing.
            DataError: There are no such files, or they hold no byte-pair encoding of bytes.
        """
        text = read_json(source)
        try:
            own = cls(text)
            if ending is None:
                ending = next((each for each in ENDINGS if each in own.parsed.special), None)
            own = cls(own.json, ending)
            _ = own._encoder
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        return own

    @property
    def vocab_size(self) -> int:
        """V, the highest id and one; ids between may be missing."""
        return len(self.parsed.pieces)

    @property
    def end_of_text(self) -> int | None:
        """The id of `ending`."""
        return None if self.ending is None else self.parsed.special[self.ending]

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of each id; special tokens have none."""
        return self.parsed.pieces

    @cached_property
    def _encoder(self) -> Any:
        library = _library()
        try:
            encoder = library.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises no other
            raise DataError(f"the library tokenizers refuses the tokenizer: {error}") from None
        for token, i in self.parsed.added.items():
            own = encoder.token_to_id(token)
            if own != i:  # it takes an id of its own for one that is taken or not the next
                raise DataError(f"the library tokenizers gives {token!r} the id {own}, not {i}")
        encoder.encode_special_tokens = True
        return encoder

    def _ids(self, text: str, unknown: Unknown) -> Iterator[list[int]]:
        """The ids of the parts of a text."""
        check_text(text, unknown)
        if _SURROGATE.search(text):
            text = _without_surrogates(text) if unknown == "skip" else _refuse_surrogates(text)
        parts = [*_parts(text)] if self.parsed.by_words else [text]
        for i in range(0, len(parts), PARTS_AT_ONCE):
            group = parts[i : i + PARTS_AT_ONCE]
            for found in self._encoder.encode_batch_fast(group, add_special_tokens=False):
                yield found.ids

    def encode(self, text: str, unknown: Unknown = "error") -> list[int]:
        """Returns the ids of a text; only halves of surrogate pairs are unknown. See Tokenizer.

        Raises:
            ConfigError: The library is missing.
        """
        return [*chain.from_iterable(self._ids(text, unknown))]

    def encode_tensor(self, text: str, unknown: Unknown = "error") -> torch.Tensor:
        """Like `encode`, but returns a 1-D int64 tensor; faster, for a whole corpus."""
        parts = [np.array(ids, np.int32) for ids in self._ids(text, unknown)]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """Returns the text of `ids` without special tokens; U+FFFD for what is no UTF-8."""
        pieces = self.parsed.pieces
        data = b"".join(pieces[i] for i in checked_ids(ids, len(pieces)))
        return data.decode("utf-8", "replace")

    def decoder(self) -> codecs.IncrementalDecoder:
        """See Tokenizer."""
        return codecs.getincrementaldecoder("utf-8")("replace")

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole tokenizer as a JSON-able dict for `from_dict`."""
        return {"kind": "bpe", "json": self.json, "ending": self.ending}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "BPETokenizer":
        """Rebuilds a tokenizer from `to_dict`, without the library.

        Raises:
            DataError: `d` has not that form, or is no valid tokenizer.
        """
        form = d if isinstance(d, dict) and d.get("kind") == "bpe" else {}
        json, ending = form.get("json"), form.get("ending")
        if isinstance(json, str) and (ending is None or isinstance(ending, str)):
            return cls(json, ending)
        raise DataError("expected a tokenizer of the form {'kind': 'bpe', 'json': ..., ...}")


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise ConfigError(
            "byte-pair encoding needs the library tokenizers: pip install 'gptfast-kernels[bpe]'"
        ) from None
    return tokenizers


def _parts(text: str) -> Iterator[str]:
    """Cuts a text where GPT-2's pre-tokenization does, about every CHARACTERS_AT_ONCE."""
    start = 0
    while start < len(text):
        found = _BOUNDARY.search(text, start + CHARACTERS_AT_ONCE)
        end = len(text) if found is None else found.start()
        yield text[start:end]
        start = end


def _checked_parts(text: str) -> Iterator[str]:
    check_text(text, "error")
    return _parts(_refuse_surrogates(text))


def _without_surrogates(text: str) -> str:
    return _SURROGATE.sub("", text)


def _refuse_surrogates(text: str) -> str:
    found = _SURROGATE.search(text)
    if found is not None:
        why = "is half of a surrogate pair, which UTF-8 does not have"
        raise unknown_character(text, found.start(), why)
    return text
