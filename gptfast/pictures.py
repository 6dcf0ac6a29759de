"""What all pictures share: their formats, their colours, how they are written.

Needs matplotlib, the extra `plot`.
"""

import warnings
from pathlib import Path
from typing import Any

from gptfast.errors import ConfigError, DataError

SUFFIXES = (".png", ".svg", ".pdf")
# Told apart by colour-blind readers too (Okabe and Ito, "Color Universal Design", 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#555555"


def check_picture(path: Path) -> None:
    """Raises ConfigError where a picture of this name cannot be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a picture's name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'gptfast-kernels[plot]'") from None


def save_picture(figure: Any, path: Path) -> Path:
    """Writes a figure of matplotlib's to a file, whose directory is made if missing.

    Returns:
        The path.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():  # a character that the font lacks becomes a box
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path
