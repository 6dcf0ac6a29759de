"""Character tokenizer: id 0 is padding, ids from 1 on are the text's characters, sorted."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from gptfast.errors import DataError

PAD = "<PAD>"
PAD_ID = 0

Unknown = Literal["error", "skip"]


class UnknownCharacterError(DataError):
    """A text has a character outside the vocabulary."""


@dataclass(frozen=True)
class Place:
    """A place in a text, as errors name it."""

    position: int = 0  # characters before it
    line: int = 1
    column: int = 1

    def after(self, text: str) -> "Place":
        """The place behind `text`, which starts here."""
        lines = text.count("\n")
        column = len(text) - text.rfind("\n") if lines else self.column + len(text)
        return Place(self.position + len(text), self.line + lines, column)


@dataclass(frozen=True)
class CharTokenizer:
    """Maps characters to ids and back: `chars[i]` has id `i + 1`, and id 0 is `<PAD>`.

    Args:
        chars: distinct single characters in the order of their ids, at least one.

    Raises:
        DataError: if `chars` is empty, has duplicates or an item that is not one character.
    """

    chars: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "chars", tuple(self.chars))
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
            DataError: if `text` is empty.
        """
        if not text:
            raise DataError("a vocabulary cannot be made from an empty text")
        return cls(tuple(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """The number of ids, including padding."""
        return len(self.chars) + 1

    @cached_property
    def _id_of_code(self) -> np.ndarray:
        # The table has one more entry, PAD_ID, to which `_ids` clips all larger code points.
        codes = [ord(char) for char in self.chars]
        table = np.zeros(max(codes) + 2, dtype=np.int64)
        table[codes] = np.arange(1, self.vocab_size)
        return table

    def _ids(self, text: str, unknown: Unknown) -> np.ndarray:
        if unknown not in ("error", "skip"):
            raise ValueError(f"encode: unknown must be 'error' or 'skip', got {unknown!r}")
        if not isinstance(text, str):
            raise TypeError(f"encode: text must be a str, got {type(text).__name__}")
        # surrogatepass: Python decodes arguments that are not UTF-8 to lone surrogates.
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        table = self._id_of_code
        ids = table[np.minimum(codes, len(table) - 1)]
        known = ids != PAD_ID
        if known.all():
            return ids
        if unknown == "skip":
            return ids[known]
        position = int(np.argmin(known))
        raise self.unknown_character(text[position], Place().after(text[:position]))

    def first_unknown(self, text: str) -> int | None:
        """Returns the position of the first character outside the vocabulary, if there is one."""
        known = set(self.chars)
        return next((i for i, char in enumerate(text) if char not in known), None)

    def unknown_character(self, char: str, place: Place) -> UnknownCharacterError:
        """Returns the error that names a character outside the vocabulary and its place."""
        return UnknownCharacterError(
            f"character {char!r} at position {place.position} (line {place.line}, column "
            f"{place.column}) is not in the vocabulary of {len(self.chars)} characters"
        )

    def encode(self, text: str, unknown: Unknown = "error") -> list[int]:
        """Returns the ids of the characters of `text`.

        Args:
            text: any string; an empty one gives an empty list.
            unknown: what to do with characters outside the vocabulary: "error" or "skip".

        Raises:
            DataError: if a character is not in the vocabulary; names it and its position.
        """
        return self._ids(text, unknown).tolist()

    def encode_tensor(self, text: str, unknown: Unknown = "error") -> torch.Tensor:
        """Like `encode`, but returns a 1-D int64 tensor; faster, for a whole corpus."""
        return torch.from_numpy(self._ids(text, unknown))

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """Returns the text of `ids`, a flat sequence or 1-D tensor of integers; skips padding.

        Raises:
            DataError: if an id is negative or not below `vocab_size`.
            TypeError: if `ids` is not a flat sequence of integers.
        """
        values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if not all(isinstance(i, int | np.integer) for i in values):
            raise TypeError("decode: ids must be a flat sequence of integers")
        for i in values:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is out of range: expected 0 to {len(self.chars)}")
        return "".join(self.chars[i - 1] for i in values if i != PAD_ID)

    @property
    def pieces(self) -> list[str]:
        """The text of each id; that of padding is empty."""
        return ["", *self.chars]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serialisable dict for `from_dict`: the code points in order of their ids.

        A single string would not survive: JSON joins two lone surrogates into one character.
        """
        return {"kind": "char", "code_points": [ord(char) for char in self.chars]}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "CharTokenizer":
        """Rebuilds a tokenizer from `to_dict`, or from the string `chars` of earlier versions.

        Raises:
            DataError: if `d` has neither form.
        """
        form = d if isinstance(d, dict) and d.get("kind") == "char" else {}
        points, chars = form.get("code_points"), form.get("chars")
        if isinstance(points, list) and all(
            type(point) is int and 0 <= point <= sys.maxunicode for point in points
        ):
            return cls(tuple(chr(point) for point in points))
        if points is None and isinstance(chars, str):
            return cls(tuple(chars))
        raise DataError("expected a tokenizer of the form {'kind': 'char', 'code_points': [...]}")
