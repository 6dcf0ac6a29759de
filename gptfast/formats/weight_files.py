"""Reads the files in which models of others lie: safetensors, torch's archives, JSON."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptfast.errors import CheckpointError
from gptfast.integrity import reading

_ZIP = b"PK\x03\x04"
_LENGTH = 8  # bytes before the JSON of a safetensors file


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file with one JSON object.

    Raises:
        CheckpointError: The file is missing, damaged or holds something else.
    """
    with reading(file):
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    return content


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as one of safetensors does. Raises CheckpointError if unreadable."""
    with reading(file), open(file, "rb") as opened:
        return opened.read(_LENGTH + 1)[_LENGTH:] == b"{"


def read_names(file: Path) -> list[str]:
    """Reads the names of the tensors in a safetensors file. Raises CheckpointError if damaged."""
    with reading(file), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Maps the tensors of a file, which may change with it. Raises CheckpointError if damaged."""
    with reading(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def read_torch(file: Path) -> Any:
    """Reads what `torch.save` wrote, tensors and plain values alone.

    Returns:
        The content. Its tensors are on the CPU and may be mapped: they may change with the file.

    Raises:
        CheckpointError: The file is damaged, or holds objects of other classes.
    """
    with reading(file):
        with open(file, "rb") as opened:
            zipped = opened.read(len(_ZIP)) == _ZIP  # files of torch before 1.6 are not
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError:  # its message says how to run whatever is in the file
            raise ValueError(
                "it is no file of torch.save, or holds more than tensors and plain values"
            ) from None
