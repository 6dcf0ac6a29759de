"""Checksums, so that a file is read whole or refused, and one sentence for a damaged file."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from gptfast.errors import CheckpointError, GptfastError

_SEAL = b"gptfast-sha256:"
_READ_AT_ONCE = 1 << 20
NO_TENSORS = "it is no file of torch.save, or holds more than tensors and plain values"


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns any error that parsers raise for a damaged file into one sentence that names it.

    Raises:
        CheckpointError: Anything but a GptfastError was raised inside; a GptfastError passes.
    """
    try:
        yield
    except GptfastError:
        raise
    except Exception as error:  # arbitrary bytes raise arbitrary errors
        raise CheckpointError(
            f"{file}: the file is damaged or unreadable ({_reason(file, error)})"
        ) from error


def _reason(file: Path, error: Exception) -> str:
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: git lfs pull gets the file itself"
    if start.startswith(b"GGUF"):
        return "it is a GGUF, which gptfast writes and does not read"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a page of HTML"
    lines = str(error).splitlines()
    kind = type(error).__name__
    if not lines:
        return kind
    return f"no entry {lines[0]}" if isinstance(error, KeyError) else lines[0]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors on the CPU: names, dtypes, shapes and values in the names' order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save_sealed(content: Any, file: BinaryIO) -> None:
    """Writes by `torch.save`, and then the sha256 of all that, which readers of zip archives skip.

    Args:
        content: What `torch.load` gives back.
        file: Empty, open for writing.
    """
    hashed = _Hashed(file)
    torch.save(content, cast("IO[bytes]", hashed))
    file.write(_SEAL + hashed.sha.hexdigest().encode("ascii"))


def load_sealed(file: BinaryIO) -> tuple[Any, bool]:
    """Reads what `save_sealed` or `torch.save` wrote, onto the CPU.

    Args:
        file: Open for reading.

    Returns:
        The content, and whether there is a checksum.

    Raises:
        ValueError: The file's checksum is wrong, or it is damaged.
    """
    sealed = _check_seal(file)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False), sealed
    except MemoryError:
        raise
    except Exception as error:  # torch's sentences advise to run whatever is in the file
        raise ValueError(NO_TENSORS) from error


class _Hashed:
    """A file to write to that counts what is written into a checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _check_seal(file: BinaryIO) -> bool:
    length = len(_SEAL) + 2 * hashlib.sha256().digest_size  # in hexadecimal digits
    left = file.seek(0, os.SEEK_END) - length
    file.seek(max(left, 0))
    seal = file.read()
    if left < 0 or not seal.startswith(_SEAL):
        return False
    file.seek(0)
    sha = hashlib.sha256()
    while left > 0 and (data := file.read(min(left, _READ_AT_ONCE))):
        sha.update(data)
        left -= len(data)
    if sha.hexdigest().encode("ascii") != seal[len(_SEAL) :]:
        raise ValueError("its checksum is another one")
    return True
