"""What all tokenizers share: checks of texts and ids, and what UTF-8 says about bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from gptfast.errors import DataError

Unknown = Literal["error", "skip"]

_CONTINUATION = bytes(range(0x80, 0xC0))  # the bytes of a character in UTF-8 after its first


def check_text(text: str, unknown: Unknown) -> None:
    """Checks the arguments of `encode`.

    Raises:
        TypeError: `text` is no str.
        ValueError: `unknown` is neither "error" nor "skip".
    """
    if unknown not in ("error", "skip"):
        raise ValueError(f"encode: unknown must be 'error' or 'skip', got {unknown!r}")
    if not isinstance(text, str):
        raise TypeError(f"encode: text must be a str, got {type(text).__name__}")


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

    def within(self, other: "Place") -> "Place":
        """This place of a part of a text that starts at `other`, as a place of that text."""
        column = self.column + (other.column - 1 if self.line == 1 else 0)
        return Place(self.position + other.position, self.line + other.line - 1, column)


class UnknownCharacterError(DataError):
    """A text has a character that a tokenizer does not encode.

    Args:
        char: The character.
        place: Its place in the text.
        why: The end of the sentence.
    """

    def __init__(self, char: str, place: Place, why: str) -> None:
        super().__init__(
            f"character {char!r} at position {place.position} "
            f"(line {place.line}, column {place.column}) {why}"
        )
        self._facts = char, place, why

    def __reduce__(self) -> tuple[Any, ...]:
        return UnknownCharacterError, self._facts

    def within(self, start: Place) -> "UnknownCharacterError":
        """The error for the text of which a part that starts at `start` was encoded."""
        char, place, why = self._facts
        return UnknownCharacterError(char, place.within(start), why)


def unknown_character(text: str, position: int, why: str) -> UnknownCharacterError:
    """Returns the error that names a character of a text, its position, line and column."""
    return UnknownCharacterError(text[position], Place().after(text[:position]), why)


def checked_ids(ids: Iterable[int] | torch.Tensor, vocab_size: int) -> list[int]:
    """Returns the argument of `decode` as a list.

    Args:
        ids: A flat sequence or 1-D tensor of integers.
        vocab_size: Above all of them.

    Raises:
        DataError: An id is negative or not below `vocab_size`.
        TypeError: `ids` is not a flat sequence of integers.
    """
    values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if not all(isinstance(i, int | np.integer) for i in values):
        raise TypeError("decode: ids must be a flat sequence of integers")
    for i in values:
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} is out of range: expected 0 to {vocab_size - 1}")
    return values


def characters_in(data: bytes) -> int:
    """How many characters begin in a piece of UTF-8."""
    return len(data.translate(None, _CONTINUATION))
