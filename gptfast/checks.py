"""Checks that the options of several modules share."""

import operator
from collections.abc import Iterable
from typing import Any, TypeGuard

from gptfast.errors import ConfigError

MOST = 2**31 - 1  # that an option may count
SEEDS = 2**63  # how many keys of random numbers there are


def as_int(x: Any) -> int | None:
    """A whole number of any type as an int; None where it is none, as an array or a bool is."""
    if type(x) is int:  # torch.compile follows no more than this
        return x
    if getattr(x, "ndim", 0):
        return None
    value = x.item() if hasattr(x, "item") else x  # of numpy's and torch's types
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_iterable(x: Any) -> TypeGuard[Iterable[Any]]:
    """Whether there is something to go through, which a tensor or an array of no dimension lacks.

    Nothing of it is taken.
    """
    try:
        iter(x)
    except TypeError:
        return False
    return True


def check_count(name: str, value: Any, least: int, most: int = MOST) -> int:
    """An option that counts something as an int. Raises ConfigError where it does not."""
    count = as_int(value)
    if count is None or not least <= count <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return count


def check_seed(value: Any) -> int:
    """A key of random numbers as an int. Raises ConfigError where it is none."""
    seed = as_int(value)
    if seed is None or not 0 <= seed < SEEDS:
        raise ConfigError(f"seed must be a whole number in [0, 2**63), got {value!r}")
    return seed
