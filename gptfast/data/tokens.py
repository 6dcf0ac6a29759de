"""Texts as tokens of the smallest dtype, encoded piece by piece."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gptfast.data.texts import cut, last_cut
from gptfast.encoding import Place, Unknown, UnknownCharacterError
from gptfast.errors import DataError
from gptfast.tokenizer import CharTokenizer, Tokenizer

CHECKED = 20_000  # characters to encode as a whole and in two parts, for comparison

SEGMENT = 2**25  # bytes; the allocator gives so much back to the system as soon as it is freed


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns the smallest unsigned dtype, of 8, 16 or 32 bits, that holds all ids."""
    sizes = (np.uint8, np.uint16, np.uint32)
    return np.dtype(next(size for size in sizes if vocab_size - 1 <= np.iinfo(size).max))


class Growing:
    """A growing array that never holds more than one segment twice in memory.

    Args:
        dtype: The dtype of its elements.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._full: list[np.ndarray] = []
        self._last = self._segment()  # takes memory only where it is written
        self._used = 0  # elements of the last one

    def _segment(self) -> np.ndarray:
        return np.empty(SEGMENT // self._dtype.itemsize, self._dtype)

    def append(self, values: np.ndarray) -> None:
        """Adds values, which the dtype must hold."""
        while len(values):
            if self._used == len(self._last):
                self._full.append(self._last)
                self._last, self._used = self._segment(), 0
            some = values[: len(self._last) - self._used]
            self._last[self._used : self._used + len(some)] = some
            self._used += len(some)
            values = values[len(some) :]

    def whole(self) -> np.ndarray:
        """Returns the array; must be the last call."""
        if not self._full:
            return self._last[: self._used]
        out = np.empty(len(self._full) * len(self._last) + self._used, self._dtype)
        out[len(out) - self._used :] = self._last[: self._used]
        del self._last
        for end in range(len(self._full), 0, -1):
            segment = self._full.pop()
            out[(end - 1) * len(segment) : end * len(segment)] = segment
        return out


def char_tokenizer(blocks: Iterable[str]) -> CharTokenizer:
    """Makes a tokenizer of the characters of a text, like `CharTokenizer.from_text`."""
    found: set[str] = set()
    for block in blocks:
        found.update(block)
    return CharTokenizer.from_text("".join(found))


def encoded(tokenizer: Tokenizer, blocks: Iterable[str], unknown: Unknown = "error") -> Tensor:
    """Encodes a text without holding all of it, or all tokens as int64, in memory.

    Returns:
        (N,) of `dtype_for` the vocabulary.

    Raises:
        DataError: The text has characters that the tokenizer lacks, or its tokens are others when
            it is cut.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    found, start = Growing(dtype), Place()
    for i, piece in enumerate(cut(blocks)):
        if i == 1:
            check_cuts(tokenizer, piece)
        try:
            ids = tokenizer.encode_tensor(piece, unknown)
        except UnknownCharacterError as error:
            raise error.within(start) from None
        found.append(ids.numpy())
        start = start.after(piece)
    return torch.from_numpy(found.whole())


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
