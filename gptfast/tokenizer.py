"""What a tokenizer is, and the tokenizer of characters: id 0 is padding, then sorted characters.

Other projects' tokenizers have no padding: the first character has id 0 (`padded=False`).
"""

import codecs
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from gptfast.checks import kind_of
from gptfast.encoding import Unknown, characters_in, check_text, checked_ids, unknown_character
from gptfast.errors import ConfigError, DataError

PAD = "<PAD>"
PAD_ID = 0
COUNTED_AT_ONCE = 2**20  # tokens

_UNKNOWN = -1  # what characters without an id have in a tokenizer's table


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer: CharTokenizer, BPETokenizer or a user's."""

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        ...

    @property
    def unit(self) -> str:
        """What an id stands for: "character" (each for one) or "token"."""
        ...

    @property
    def padding(self) -> int | None:
        """The id that stands for no text and is not trained; None: there is none."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a text, and separates texts in a token file; None: there is none."""
        ...

    @property
    def pieces(self) -> list[bytes]:
        """The bytes in UTF-8 that each id stands for, perhaps a part of a character, or nothing."""
        ...

    def decoder(self) -> codecs.IncrementalDecoder:
        """Makes what turns the bytes of `pieces` into text, part by part."""
        ...

    def encode(self, text: str, unknown: Unknown = "error") -> list[int]:
        """Returns the ids of a text.

        Args:
            text: Any string; an empty one gives an empty list.
            unknown: What to do with characters that have no id: "error" or "skip".

        Raises:
            DataError: A character has no id; names it and its position.
        """
        ...

    def encode_tensor(self, text: str, unknown: Unknown = "error") -> torch.Tensor:
        """Like `encode`, but returns a 1-D int64 tensor; faster, for a whole corpus."""
        ...

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """Returns the text of ids, a flat sequence or 1-D tensor of integers.

        Raises:
            DataError: An id is negative or not below `vocab_size`.
            TypeError: `ids` is not a flat sequence of integers.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Returns the tokenizer as a JSON-able dict, which `from_dict` takes."""
        ...


class TextSize(NamedTuple):
    """How long a text is."""

    characters: int
    utf8_bytes: int
    endings: int  # tokens that end a text, and write nothing


def text_size(tokenizer: Tokenizer, ids: torch.Tensor) -> TextSize:
    """Measures the text of ids.

    Args:
        tokenizer: The tokenizer of the ids.
        ids: (N,) int64 or smaller integers; those that the tokenizer does not have write nothing.
    """
    V = tokenizer.vocab_size
    counts = torch.zeros(V, dtype=torch.int64)
    for some in ids.split(COUNTED_AT_ONCE):
        counts += torch.bincount(some.cpu().long(), minlength=V)[:V]
    each = list(zip(counts.tolist(), tokenizer.pieces, strict=True))
    characters = sum(n * characters_in(piece) for n, piece in each)
    end = tokenizer.end_of_text
    endings = 0 if end is None else int(counts[end])
    return TextSize(characters, sum(n * len(piece) for n, piece in each), endings)


def from_dict(d: dict[str, Any]) -> Tokenizer:
    """Rebuilds a tokenizer of either kind from its `to_dict`.

    Raises:
        DataError: `d` is of neither kind, or is no valid tokenizer.
    """
    if isinstance(d, dict) and d.get("kind") == "bpe":
        from gptfast.bpe import BPETokenizer

        return BPETokenizer.from_dict(d)
    return CharTokenizer.from_dict(d)


def check_is_tokenizer(tokenizer: Any) -> None:
    """Raises ConfigError for what is neither a tokenizer nor None."""
    known = hasattr(tokenizer, "vocab_size") and hasattr(tokenizer, "encode")
    if tokenizer is not None and (not known or isinstance(tokenizer, type)):
        raise ConfigError(f"tokenizer must be one, as a CharTokenizer, got {kind_of(tokenizer)}")


def check_kept(tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if `from_dict` would not give a tokenizer back as it is.

    A subclass or a user's own tokenizer can be trained and generated with, but not stored.
    """
    from gptfast.bpe import BPETokenizer

    if tokenizer is not None and type(tokenizer) not in (CharTokenizer, BPETokenizer):
        raise ConfigError(
            f"a tokenizer of type {type(tokenizer).__name__} cannot be stored, it would not come"
            " back as it is: only a CharTokenizer or a BPETokenizer would"
        )


@dataclass(frozen=True)
class CharTokenizer:
    """Maps characters to ids and back: `chars[i]` has id `i + 1`, and id 0 is `<PAD>`.

    Args:
        chars: Distinct single characters in the order of their ids, at least one.
        padded: False makes a tokenizer without padding, as nanoGPT's: `chars[i]` has id `i`.

    Raises:
        DataError: `chars` is empty, has duplicates or an item that is not one character, or
            `padded` is no bool.
    """

    chars: tuple[str, ...]
    padded: bool = True

    unit = "character"
    end_of_text = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "chars", tuple(self.chars))
        if not isinstance(self.padded, bool):
            raise DataError(f"padded must be True or False, got {self.padded!r}")
        if not self.chars:
            raise DataError("a vocabulary needs at least one character, got none")
        for char in self.chars:
            if not isinstance(char, str) or len(char) != 1:
                raise DataError(f"a vocabulary holds single characters, got {char!r}")
        if len(set(self.chars)) != len(self.chars):
            repeated = next(c for i, c in enumerate(self.chars) if c in self.chars[:i])
            raise DataError(f"a vocabulary holds distinct characters, got {repeated!r} twice")

    def __repr__(self) -> str:
        return f"CharTokenizer(vocab_size={self.vocab_size})"

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Makes a tokenizer from the distinct characters of `text`, sorted by code point.

        Raises:
            DataError: `text` is empty.
        """
        if not text:
            raise DataError("a vocabulary cannot be made from an empty text")
        return cls(tuple(sorted(set(text))))

    @property
    def padding(self) -> int | None:
        """The id of `<PAD>`; None: there is none."""
        return PAD_ID if self.padded else None

    @property
    def vocab_size(self) -> int:
        """The number of ids, including padding."""
        return len(self._written)

    @cached_property
    def _written(self) -> tuple[str, ...]:
        """What each id writes."""
        return ("", *self.chars) if self.padded else self.chars

    @cached_property
    def _id_of_code(self) -> np.ndarray:
        # The table has one more entry, _UNKNOWN, to which `_ids` clips all larger code points.
        codes = [ord(char) for char in self.chars]
        table = np.full(max(codes) + 2, _UNKNOWN, dtype=np.int64)
        table[codes] = np.arange(self.vocab_size - len(codes), self.vocab_size)
        return table

    def _ids(self, text: str, unknown: Unknown) -> np.ndarray:
        check_text(text, unknown)
        # surrogatepass: Python decodes arguments that are not UTF-8 to lone surrogates.
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        table = self._id_of_code
        ids = table[np.minimum(codes, len(table) - 1)]
        known = ids != _UNKNOWN
        if known.all():
            return ids
        if unknown == "skip":
            return ids[known]
        why = f"is not in the vocabulary of {len(self.chars)} characters"
        raise unknown_character(text, int(np.argmin(known)), why)

    def encode(self, text: str, unknown: Unknown = "error") -> list[int]:
        """Returns the ids of the characters of `text`; see Tokenizer."""
        return self._ids(text, unknown).tolist()

    def encode_tensor(self, text: str, unknown: Unknown = "error") -> torch.Tensor:
        """Like `encode`, but returns a 1-D int64 tensor; faster, for a whole corpus."""
        return torch.from_numpy(self._ids(text, unknown))

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """Returns the text of `ids`; skips padding. See Tokenizer."""
        return "".join(self._written[i] for i in checked_ids(ids, self.vocab_size))

    @property
    def pieces(self) -> list[bytes]:
        """The UTF-8 of each id: empty for padding, 3 bytes for half of a surrogate pair."""
        return [text.encode("utf-8", "surrogatepass") for text in self._written]

    def decoder(self) -> codecs.IncrementalDecoder:
        """See Tokenizer."""
        return codecs.getincrementaldecoder("utf-8")("surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serialisable dict for `from_dict`: the code points in order of their ids.

        A single string would not survive: JSON joins two lone surrogates into one character.
        """
        form: dict[str, Any] = {"kind": "char", "code_points": [ord(char) for char in self.chars]}
        return form if self.padded else form | {"padded": False}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "CharTokenizer":
        """Rebuilds a tokenizer from `to_dict`, or from the string `chars` of earlier versions.

        Raises:
            DataError: `d` has neither form.
        """
        form = d if isinstance(d, dict) and d.get("kind") == "char" else {}
        points, chars = form.get("code_points"), form.get("chars")
        if isinstance(points, list) and all(
            type(point) is int and 0 <= point <= sys.maxunicode for point in points
        ):
            return cls(tuple(chr(point) for point in points), form.get("padded", True))
        if points is None and isinstance(chars, str):
            return cls(tuple(chars))
        raise DataError("expected a tokenizer of the form {'kind': 'char', 'code_points': [...]}")
