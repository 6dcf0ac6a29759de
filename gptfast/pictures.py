"""What all pictures share: their formats, their colours, how they are written.

Drawing needs matplotlib, the extra `plot`.
"""

import importlib.util
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gptfast.errors import ConfigError, DataError, reason

SUFFIXES = (".png", ".svg", ".pdf")
# Told apart by colour-blind readers too (Okabe and Ito, "Color Universal Design", 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#555555"
DPI, SCREEN_DPI = 150, 110  # of files; of figures with small letters in a notebook
VISIBLE = {"\n": "⏎", "\t": "⇥"}


def visible(text: str) -> str:
    """Returns the text with a visible character for each that is not printable."""
    replaced = (VISIBLE.get(char, "\N{REPLACEMENT CHARACTER}") for char in text)
    return "".join(a if a.isprintable() else b for a, b in zip(text, replaced, strict=True))


def can_draw() -> bool:
    """Whether matplotlib is there; does not import it."""
    return importlib.util.find_spec("matplotlib") is not None


def check_picture(path: Path) -> None:
    """Raises ConfigError or DataError where a picture of this name cannot be drawn or written."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a picture's name must end in {', '.join(SUFFIXES)}")
    folder = next(each for each in path.absolute().parents if each.exists())
    if path.exists():
        writable = path.is_file() and os.access(path, os.W_OK)
    else:
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    if not writable:
        raise DataError(f"{path}: cannot be written")
    check_matplotlib()


def check_matplotlib() -> None:
    """Raises ConfigError where nothing can be drawn."""
    if not can_draw():
        raise ConfigError("pictures need matplotlib: pip install 'gptfast-kernels[plot]'")


def save_picture(path: str | Path, draw: Callable[[], Any]) -> Path:
    """Draws a picture and writes it to a file, whose directory is created if missing.

    Args:
        path: The file, PNG, SVG or PDF by its suffix.
        draw: Returns a matplotlib figure; called only if a picture of this name can be drawn.

    Returns:
        The path.

    Raises:
        ConfigError: The suffix is unknown, or matplotlib is missing.
        DataError: The file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    figure = draw()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(figure, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)})") from error
    return path


def png(figure: Any) -> bytes:
    """Returns a matplotlib figure as a PNG."""
    file = io.BytesIO()
    _write(figure, file)
    return file.getvalue()


def _write(figure: Any, file: Path | BinaryIO) -> None:
    with warnings.catch_warnings():  # a character that the font lacks becomes a box
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, dpi=DPI)
