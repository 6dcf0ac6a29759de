"""What all tokenizers share: checks of texts and ids, and what UTF-8 says about bytes."""

from collections.abc import Iterable
from typing import Literal

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


def place_of(text: str, position: int) -> str:
    """Names a character of a text, its position, line and column, for errors."""
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return f"character {text[position]!r} at position {position} (line {line}, column {column})"


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
