"""Texts as tokens of the smallest dtype, encoded piece by piece."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from gptfast.data.texts import cut, last_cut
from gptfast.errors import DataError
from gptfast.tokenizer import CharTokenizer, Place, Unknown, UnknownCharacterError
from gptfast.tokenizer import CharTokenizer as Tokenizer

CHECKED = 20_000  # characters whose tokens are compared with those of two parts

Blocks = Callable[[], Iterable[str]]  # a text, in pieces that are cut anywhere; can be called again


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns the smallest unsigned dtype, of 8, 16 or 32 bits, that holds all ids."""
    sizes = (np.uint8, np.uint16, np.uint32)
    return np.dtype(next(size for size in sizes if vocab_size - 1 <= np.iinfo(size).max))


def char_tokenizer(blocks: Iterable[str]) -> CharTokenizer:
    """Makes a tokenizer of the characters of a text, like `CharTokenizer.from_text`."""
    found: set[str] = set()
    for block in blocks:
        found.update(block)
    return CharTokenizer.from_text("".join(found))


def encoded(tokenizer: Tokenizer, blocks: Blocks, unknown: Unknown = "error") -> Tensor:
    """Encodes a text without ever having it, or its tokens as int64, as a whole.

    Returns:
        (N,) of `dtype_for` the vocabulary.

    Raises:
        DataError: the text has characters that the tokenizer lacks, or its tokens are others when
            it is cut.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    for piece in cut(blocks()):
        if len(parts) == 1:
            check_cuts(tokenizer, piece)
        try:
            ids = tokenizer.encode_tensor(piece, unknown)
        except UnknownCharacterError as error:
            raise located(error, tokenizer, blocks()) from None
        parts.append(ids.numpy().astype(dtype))
    return torch.from_numpy(np.concatenate(parts or [np.zeros(0, dtype)]))


def check_cuts(tokenizer: Tokenizer, text: str) -> None:
    """Raises DataError if a tokenizer's tokens differ when a text is cut as `cut` does it."""
    if isinstance(tokenizer, CharTokenizer):
        return
    text = text[:CHECKED]
    at = last_cut(text[: CHECKED // 2])
    parts = tokenizer.encode(text[:at], "skip") + tokenizer.encode(text[at:], "skip")
    if parts != tokenizer.encode(text, "skip"):
        raise DataError(
            "the tokenizer gives other tokens for a text that is cut between a word and the white "
            "space after it: it can encode no text of more than a million characters"
        )


def located(
    error: UnknownCharacterError, tokenizer: Tokenizer, blocks: Iterable[str]
) -> UnknownCharacterError:
    """Returns the error of an unknown character in a piece with its place in the whole text."""
    place = Place()
    for block in blocks if isinstance(tokenizer, CharTokenizer) else ():
        position = tokenizer.first_unknown(block)
        if position is not None:
            return tokenizer.unknown_character(block[position], place.after(block[:position]))
        place = place.after(block)
    return error
