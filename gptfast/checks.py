"""Checks that the options of several modules share."""

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from gptfast.errors import ConfigError

if TYPE_CHECKING:
    import torch

MOST = 2**31 - 1  # largest value of a counting option
SEEDS = 2**63  # how many keys of random numbers there are
LONGEST_NAME = 255  # bytes of the name of a file or folder
LONGEST_PATH = 4095


def as_int(x: Any) -> int | None:
    """A whole number of any type as an int; None if x is no integer (arrays and bools are not)."""
    if type(x) is int:  # torch.compile follows no more than this
        return x
    value = _item(x)
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_number(x: Any) -> float | None:
    """A real number of any type as a float; None where it is none, as an array or a bool is."""
    value = _item(x)
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    except OverflowError:  # of a whole number
        return math.inf if value > 0 else -math.inf


def _item(x: Any) -> Any:
    """The number in one of numpy's or torch's objects, None with dimensions; others as they are."""
    if getattr(x, "ndim", 0):
        return None
    return x.item() if hasattr(x, "item") else x


def is_iterable(x: Any) -> TypeGuard[Iterable[Any]]:
    """Whether x can be iterated; a tensor or an array of no dimension cannot.

    It takes no item.
    """
    try:
        iter(x)
    except TypeError:
        return False
    return True


def check_count(name: str, value: Any, least: int, most: int = MOST) -> int:
    """Returns a counting option as an int. Raises ConfigError if it is none in the range."""
    count = as_int(value)
    if count is None or not least <= count <= most:
        got = shortened(value)
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {got}")
    return count


def check_seed(value: Any) -> int:
    """Returns a key of random numbers as an int. Raises ConfigError if it is none."""
    seed = as_int(value)
    if seed is None or not 0 <= seed < SEEDS:
        raise ConfigError(f"seed must be a whole number in [0, 2**63), got {shortened(value)}")
    return seed


def check_is(name: str, value: Any, kind: type, expected: str) -> None:
    """Raises ConfigError where an argument is not of a class, which `expected` names."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be {expected}, got {kind_of(value)}")


def check_path(name: str, value: Any) -> Path:
    """Returns an argument as a path. Raises ConfigError if it cannot name a file or folder."""
    if not isinstance(value, str | os.PathLike) or value == "":
        got = "an empty one" if value == "" else kind_of(value)
        raise ConfigError(f"{name} must be the path of a file or folder, got {got}")
    path = Path(value)
    try:
        parts = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:  # half of a surrogate pair, which no name has
        parts = [b"\0"]
    if any(b"\0" in part for part in parts):
        raise ConfigError(f"{name} must be the path of a file or folder, got {str(path)!r}")
    if max(map(len, parts), default=0) > LONGEST_NAME or sum(map(len, parts)) > LONGEST_PATH:
        raise ConfigError(
            f"{name} must be the path of a file or folder, got {len(str(value))} characters"
        )
    return path


def shortened(value: Any) -> str:
    """A value as an error shows it; of a number with thousands of digits, its size."""
    if type(value) is int and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    if type(value) in (tuple, list):
        return f"({', '.join(map(shortened, value))})"
    return repr(value)


def dtype_name(dtype: "torch.dtype") -> str:
    """A dtype as an error names it: float32."""
    return str(dtype).removeprefix("torch.")


def kind_of(value: Any) -> str:
    """What a value is, as an error names it: a str, or the class str."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
