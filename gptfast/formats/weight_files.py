"""Reads the files of other projects' models: safetensors, torch's archives, pickles, JSON.

It executes nothing in a file.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptfast.errors import CheckpointError
from gptfast.integrity import NO_TENSORS, reading

_ZIP = b"PK\x03\x04"
_LENGTH = 8  # bytes before the JSON of a safetensors file
# torch.compile's, DistributedDataParallel's, and of all but the head in a model with one
_PREFIXES = ("_orig_mod.", "module.", "transformer.")
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers of earlier versions


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
            raise ValueError(NO_TENSORS) from None


def read_weights(file: Path) -> dict[Any, Any]:
    """Reads tensors by their names from either kind of file.

    Raises:
        CheckpointError: The file is damaged, or holds no dict.
    """
    content = read_safetensors(file) if is_safetensors(file) else read_torch(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected weights by name, got a {type(content).__name__}")
    return content


def own_names(file: Path, weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a GPT-2's weights by our names: without prefixes, and without causal masks.

    Raises:
        CheckpointError: A name is there twice, with a prefix and without.
    """
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        own = str(name)
        while own.startswith(_PREFIXES):
            own = own.partition(".")[2]
        if _MASKS.fullmatch(own):
            continue
        if own in found:
            raise CheckpointError(f"{file}: it has {own} twice, with a prefix and without")
        found[own] = weight.detach() if isinstance(weight, torch.nn.Parameter) else weight
    return found


def read_plain(file: Path) -> Any:
    """Reads a pickle of numbers, texts, lists and dicts, without running what is in it.

    Raises:
        CheckpointError: The file is missing, damaged, or names any class or function.
    """
    with reading(file), open(file, "rb") as opened:
        return _Plain(opened).load()


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")
