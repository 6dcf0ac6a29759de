"""Text files: whole or in pieces, and where a text may be cut for a tokenizer."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gptfast.errors import DataError

PIECE = 2**17  # bytes or characters that are read, cut or encoded at once
MOST_UNCUT = 128 * PIECE


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read; what goes wrong inside becomes one sentence."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a text file, got a directory") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def read_bytes(path: Path) -> bytes:
    """Reads a file. Raises DataError if it is missing, a directory, unreadable or empty."""
    with _opened(path) as file:
        data = file.read()
    if not data:
        raise DataError(f"{path}: the file is empty")
    return data


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file: keeps line ends as they are, removes a byte order mark.

    Raises:
        DataError: The file is missing, a directory, unreadable, empty or not UTF-8.
    """
    return "".join(stream_text(path))


def stream_text(path: str | Path, read: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """Yields the text of a UTF-8 file like `read_text`, in non-empty pieces of about PIECE bytes.

    Args:
        path: The file.
        read: Called with the number of bytes of each piece.

    Raises:
        DataError: As `read_text` does, when the caller asks for the faulty piece.
    """
    path = Path(path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, found = 0, False
    with _opened(path) as file:
        while block := file.read(PIECE):
            text = _decoded(decoder, block, offset, path)
            if not offset:
                text = without_byte_order_mark(text)
            offset += len(block)
            if text:
                found = True
                yield text
            read(len(block))
        _decoded(decoder, b"", offset, path)
    if not found:
        mark = " but for a byte order mark" if offset else ""
        raise DataError(f"{path}: the file is empty{mark}")


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, path: Path) -> str:
    """Decodes the bytes of a file from `offset` on; none of them where the file ends."""
    begun = decoder.getstate()[0]  # the first bytes of a character, from the block before
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte 0x{(begun + block)[error.start]:02x} "
            f"at offset {offset - len(begun) + error.start}"
        ) from None


def without_byte_order_mark(text: str) -> str:
    """Removes the byte order mark that some editors write at the start of a file."""
    return text.removeprefix("\ufeff")


def blocks_of(text: str) -> Iterator[str]:
    """Yields a text in pieces of PIECE characters."""
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """Cuts a text anew, between a letter or digit and the white space after it.

    Byte-pair encoders split a text there anyway, so that the tokens of the pieces are those of the
    whole. A text that has no such place in MOST_UNCUT characters is cut anywhere.

    Args:
        blocks: Pieces of the text, cut anywhere.

    Yields:
        Non-empty pieces.
    """
    rest = ""
    for block in blocks:
        rest += block
        at = last_cut(rest) or (len(rest) if len(rest) > MOST_UNCUT else 0)
        if at:
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def last_cut(text: str) -> int:
    """Returns the last place where `cut` may cut, at the end of a line if possible; 0: nowhere."""
    for space in "\n ":
        at = text.rfind(space)
        while at > 0 and not text[at - 1].isalnum():
            at = text.rfind(space, 0, at)
        if at > 0:
            return at
    return 0
