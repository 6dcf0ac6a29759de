"""Pickles of others, read without running what is in them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gptfast.integrity import reading


def read_torch(file: Path) -> Any:
    """Reads what `torch.save` wrote, if it holds tensors and plain values alone.

    Args:
        file: its tensors are mapped into memory where its form allows it, so what is not used is
            not read. Whoever keeps a tensor copies it, for its values would change with the file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds objects of other classes.
    """
    with reading(file):
        try:
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
        except pickle.UnpicklingError:
            raise ValueError(
                "it is no file of torch.save, or holds more than tensors and plain values"
            ) from None


def read_plain(file: Path) -> Any:
    """Reads a pickle of numbers, texts, lists and dicts.

    Raises:
        CheckpointError: the file is missing, damaged, or names any class or function.
    """
    with reading(file), open(file, "rb") as opened:
        return _Plain(opened).load()


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")
