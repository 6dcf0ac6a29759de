"""What the tests read in the documents: code blocks, command lines, quotations of the sources."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """A code block of a page: three backticks, a language, options such as `title="..."`."""

    path: Path
    line: int  # of its first line of code, counted from 1
    language: str
    text: str
    options: dict[str, str] = field(default_factory=dict)


def blocks(path: Path, language: str | None = None) -> list[Block]:
    """Returns the code blocks of a page, those of a language if one is given."""
    page = path.read_text(encoding="utf-8")
    found = [
        Block(
            path, page.count("\n", 0, each.start()) + 2, each[1], each[3],
            dict(_OPTION.findall(each[2])),
        )
        for each in _FENCE.finditer(page)
    ]  # fmt: skip
    return [block for block in found if language in (None, block.language)]


def command_lines(text: str) -> Iterator[list[str]]:
    """Yields the words of each command in the text of a block; `\\` at its end continues a line."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def own_arguments(words: list[str]) -> list[str] | None:
    """Returns the arguments of gptfast in a command line; None if it is another program's."""
    words = list(takewhile(lambda word: word not in (">", "|", "&&"), words))
    if words[0] == "gptfast":
        return words[1:]
    if words[0] == "torchrun" and "gptfast" in words:
        return words[words.index("gptfast") + 1 :]
    return None


def quoted(block: str, source: str) -> str | None:
    """Compares quoted lines with the source; `...` alone on a line stands for lines left out.

    Returns:
        The first lines that the source does not have one after the other, in this order and however
        far they are indented; None if it has all.
    """
    there = [line.strip() for line in source.splitlines()]
    pieces = re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE)
    start = 0
    for piece in pieces:
        lines = [line.strip() for line in piece.strip("\n").splitlines()]
        places = (i for i in range(start, len(there)) if there[i : i + len(lines)] == lines)
        place = next(places, None)
        if place is None:
            return piece
        start = place + len(lines)
    return None
