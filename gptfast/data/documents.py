"""Documents: how text files are divided into them, and into pieces to encode."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gptfast.data.texts import cut, stream_text
from gptfast.encoding import Place
from gptfast.errors import DataError

JOB = 2**20  # characters


class Part(NamedTuple):
    """A piece of a document."""

    text: str
    ends: bool  # whether the document ends with it
    document: str  # the document's name, for errors
    start: Place  # the piece's place in the document


def parts(
    path: Path, separator: str | None, read: Callable[[int], None] = lambda _: None
) -> Iterator[Part]:
    """Yields the documents of a file in pieces made by `cut`.

    Args:
        path: A UTF-8 file.
        separator: The line between two documents; None: the file is one document.
            A document includes the end of its last line. An empty document does not count.
        read: See `stream_text`.

    Raises:
        DataError: See `stream_text`; there is no document in the file.
    """
    blocks = stream_text(path, read)
    number = 0
    for document in [blocks] if separator is None else _separated(blocks, separator):
        name = f"{path}" if separator is None else f"{path}, document {number + 1}"
        held, start = "", Place()  # the piece before, which is the last one if no other comes
        for piece in cut(document):
            if held:
                yield Part(held, False, name, start)
                start = start.after(held)
            held = piece
        if held:
            number += 1
            yield Part(held, True, name, start)
    if not number:
        raise DataError(f"{path}: the file has nothing but separators")


def _separated(blocks: Iterable[str], separator: str) -> Iterator[Iterator[str]]:
    """Yields documents as iterators; the caller must exhaust each before the next one."""
    tokens = _split(blocks, separator)
    more = True

    def document() -> Iterator[str]:
        nonlocal more
        for token in tokens:
            if token is None:
                return
            yield token
        more = False

    while more:
        yield document()


def _split(blocks: Iterable[str], separator: str) -> Iterator[str | None]:
    """Yields pieces of text, and None for each line that is a separator."""
    line = re.compile(rf"^{re.escape(separator)}\r?\n", re.MULTILINE)
    rest, at_start = "", True  # whether `rest` is at the start of a line
    for block in blocks:
        rest += block
        # A possible start of a separator waits for the rest of its line.
        end = rest.rfind("\n") + 1
        if len(rest) - end > len(separator) + 1:
            end = len(rest)
        text, rest = rest[:end], rest[end:]
        yield from _split_lines(text, line, at_start)
        if text:
            at_start = text.endswith("\n")
    if at_start and separator and rest.removesuffix("\r") == separator:
        yield None
    elif rest:
        yield rest


def _split_lines(text: str, line: re.Pattern[str], at_start: bool) -> Iterator[str | None]:
    done = 0
    for match in line.finditer(text):
        if match.start() == 0 and not at_start:
            continue
        if match.start() > done:
            yield text[done : match.start()]
        yield None
        done = match.end()
    if done < len(text):
        yield text[done:]


def jobs(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Yields parts together, about JOB characters at a time."""
    job: list[Part] = []
    size = 0
    for part in parts:
        job.append(part)
        size += len(part.text)
        if size >= JOB:
            yield job
            job, size = [], 0
    if job:
        yield job
