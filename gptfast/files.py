"""Files that are written whole or not at all."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

Content = bytes | Callable[[BinaryIO], object]


def write_atomic(files: Mapping[Path, Content], durable: bool = False) -> None:
    """Writes files that belong together, so that no reader finds parts of two moments.

    All are first written aside, as `<name>.tmp`; whatever fails there leaves the old files as they
    are. Then the old ones but the first are removed, and the new ones take their places in order: a
    crash in between leaves the first file, old or new, without the others. The next call
    overwrites what a killed process left aside.

    Args:
        files: By path, what each is to hold: bytes, or a function that writes to an open file.
        durable: Flushes to the disk before any old file is touched, and the folder afterwards, so
            that a loss of power leaves no empty file.

    Raises:
        OSError: A file cannot be written.
    """
    asides = {path: path.with_name(f"{path.name}.tmp") for path in files}
    try:
        for path, content in files.items():
            _write(asides[path], content, durable)
        for path in list(files)[1:]:
            path.unlink(missing_ok=True)
        for path, aside in asides.items():
            os.replace(aside, path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
    if durable:
        for folder in {path.parent for path in files}:
            _flush_folder(folder)


def _write(path: Path, content: Content, durable: bool) -> None:
    with open(path, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    # A rename is on the disk only when its folder is; Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
