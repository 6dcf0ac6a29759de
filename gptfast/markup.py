"""The HTML that notebooks show of gptfast's objects.

Text keeps the colour of the page, and every other colour is translucent, so that all of it can be
read on a light page and on a dark one.
"""

import base64
import html
import re
from collections.abc import Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")


def escaped(value: object) -> str:
    """Returns a value's text as HTML, also within an attribute; U+FFFD for half a surrogate."""
    return html.escape(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def section(title: object, *parts: str) -> str:
    """Puts parts, which are HTML, below a title."""
    return f"<div><p><b>{escaped(title)}</b></p>{''.join(parts)}</div>"


def table(rows: Sequence[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Makes a table: columns of numbers to the right, the others to the left.

    Args:
        rows: Rows of cells.
        head: The names of the columns, if they have any.
    """
    columns = zip(*rows, strict=True)
    sides = ["right" if all(map(_is_number, cells)) else "left" for cells in columns]
    parts = [_row(head, sides, "th")] if head else []
    parts += [_row(row, sides, "td") for row in rows]
    return f"<table>{''.join(parts)}</table>"


def _is_number(cell: object) -> bool:
    return re.fullmatch(r"[\d.,]*", str(cell)) is not None


def _row(cells: Sequence[object], sides: list[str], tag: str) -> str:
    made = [
        f'<{tag} style="text-align: {side}">{escaped(cell)}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    ]
    return f"<tr>{''.join(made)}</tr>"


def picture(png: bytes, text: object, width: int) -> str:
    """Embeds a picture.

    Args:
        png: The picture.
        text: What it shows, for readers who cannot see it.
        width: Its width in pixels.
    """
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escaped(text)}" width="{width}">'


def marked(text: str, note: object, strength: float) -> str:
    """Returns a piece of text with a background, and a note that appears under the pointer.

    Args:
        text: The piece; line breaks and spaces stay within `preformatted`.
        note: What the note says.
        strength: How strong the background is, from 0 to 1.
    """
    colour = f"rgba(230, 159, 0, {0.5 * min(1.0, max(0.0, strength)):.2f})"
    return f'<span title="{escaped(note)}" style="background: {colour}">{escaped(text)}</span>'


def preformatted(content: str) -> str:
    """Shows HTML with its line breaks and spaces; long lines are wrapped."""
    # A line break right after the tag is none of the content's.
    return f'<pre style="white-space: pre-wrap">\n{content}</pre>'
