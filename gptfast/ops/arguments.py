"""What the operators take: a table of tensors for each, and the check of a call against it.

The tables say what a call means: an error names the operator, the argument, what was expected and
what it got. The C++ checks once more that no kernel leaves a tensor's memory, because calls of
`torch.ops.gptfast` do not pass through here.
"""

import enum
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from gptfast.ops.autograd import constant, transformed


class Kind(enum.Enum):
    """The rule for a tensor's dtype. All tensors of a table are on one device."""

    ACTIVATION = "the dtype of the table's first tensor"
    PARAMETER = "float32 or the dtype of the table's first tensor; contiguous"
    INDICES = "int64; the kernels check the values"
    FLOATING = "any floating-point dtype"


@dataclass(frozen=True)
class Argument:
    """One tensor of an operator.

    Args:
        kind: The rule for its dtype.
        shape: A letter per dimension, such as "B H T D". Equal letters of a table are equal sizes,
            and "3C" is three times C. "..." at the start stands for any leading dimensions, the
            same ones in the whole table.
        optional: Whether it may be None.
    """

    kind: Kind
    shape: str
    optional: bool = False


def activation(shape: str) -> Argument:
    """Returns a table's entry for a tensor of Kind.ACTIVATION."""
    return Argument(Kind.ACTIVATION, shape)


def parameter(shape: str, optional: bool = False) -> Argument:
    """Returns a table's entry for a tensor of Kind.PARAMETER."""
    return Argument(Kind.PARAMETER, shape, optional)


class Table:
    """The tensors of one operator. The first one is floating-point.

    Args:
        op: The operator's public name.
        arguments: The tensors by name, in the order in which the letters get their sizes.
    """

    def __init__(self, op: str, **arguments: Argument) -> None:
        self.op = op
        self._arguments = arguments
        self._rows = tuple(_row(name, argument) for name, argument in arguments.items())

    def check(self, *tensors: Tensor | None) -> dict[str, Any]:
        """Checks the tensors of a call.

        Args:
            tensors: In the table's order.

        Returns:
            The size of each letter, and the leading dimensions as "...".

        Raises:
            ValueError: A tensor has another shape, or a parameter is not contiguous.
            TypeError: An argument is no tensor, or has another dtype or device.
        """
        found: dict[str, Any] = {}
        first: Any = tensors[0]
        if not isinstance(first, Tensor) or not first.dtype.is_floating_point:
            self._check_kind(self._rows[0][0], first, None)
        dtype, device = first.dtype, first.device
        # Every operator comes here and some take microseconds, hence plain tuples, and zip without
        # `strict`, which costs as much as the check of an argument.
        for row, x in zip(self._rows, tensors):  # noqa: B905
            name, letters, count, leading, multiples, own_dtype, as_first, contiguous = row
            if not isinstance(x, Tensor):
                if x is not None or not self._arguments[name].optional:
                    self._check_kind(name, x, dtype)
                continue
            shape = x.shape
            if leading:
                cut = len(shape) - count
                if cut < 0 or found.setdefault("...", shape[:cut]) != shape[:cut]:
                    self._refuse_shape(name, letters, x, found)
                shape = shape[cut:]
            elif len(shape) != count:
                self._refuse_shape(name, letters, x, found)
            if multiples:
                found |= {multiple: n * found[letter] for multiple, n, letter in multiples}
            for letter, size in zip(letters, shape):  # noqa: B905
                if found.setdefault(letter, size) != size:
                    self._refuse_shape(name, letters, x, found)
            got = x.dtype
            if got is not own_dtype and (got is not dtype or not as_first):
                self._check_kind(name, x, dtype)
            if x.device != device:
                raise TypeError(f"{self.op}: {name} must be on {device}, got {x.device}")
            # A slice that `vmap` takes becomes contiguous.
            if contiguous and not x.is_contiguous() and not transformed():
                raise ValueError(f"{self.op}: {name} must be contiguous, got strides {x.stride()}")
        return found

    def _check_kind(self, name: str, x: Any, first: torch.dtype | None) -> None:
        """Raises TypeError where `x` is no tensor, or not of the dtype that its kind asks for."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(x).__name__}")
        kind = self._arguments[name].kind
        if first is None or kind is Kind.FLOATING:
            if x.dtype.is_floating_point:
                return
            expected = "a floating-point tensor"
        elif kind is Kind.INDICES:
            expected = "torch.int64"
        else:
            expected = f"torch.float32 or {first}" if kind is Kind.PARAMETER else f"{first}"
        raise TypeError(f"{self.op}: {name} must be {expected}, got {x.dtype}")

    def _refuse_shape(
        self, name: str, letters: tuple[str, ...], x: Tensor, found: dict[str, Any]
    ) -> NoReturn:
        """Raises the error of a shape, which says of the expected one what is known so far."""
        leading = self._arguments[name].shape.startswith("...")
        got = tuple(x.shape)
        if len(got) == len(letters) and not leading:
            found = dict(zip(letters, got, strict=True)) | found  # a size not known may be any
        if all(letter in found for letter in letters) and (not leading or "..." in found):
            shape = (*(found["..."] if leading else ()), *(found[letter] for letter in letters))
            raise ValueError(f"{self.op}: {name} must have shape {shape}, got {got}")
        number = f"{'at least ' if leading else ''}{len(letters)}"
        dimensions = "dimension" if len(letters) == 1 else "dimensions"
        raise ValueError(f"{self.op}: {name} must have {number} {dimensions}, got shape {got}")


def _row(name: str, argument: Argument) -> tuple[Any, ...]:
    """Returns what `Table.check` reads of an argument, in the order in which it unpacks it."""
    sizes = re.findall(r"(\d*)(\w+)", argument.shape)
    letters = tuple(factor + letter for factor, letter in sizes)
    multiples = tuple((factor + letter, int(factor), letter) for factor, letter in sizes if factor)
    kind, leading = argument.kind, argument.shape.startswith("...")
    own_dtype = {Kind.PARAMETER: torch.float32, Kind.INDICES: torch.int64}.get(kind)
    as_first, contiguous = kind is not Kind.INDICES, kind is Kind.PARAMETER
    return name, letters, len(letters), leading, multiples, own_dtype, as_first, contiguous


def check_dropout(op: str, dropout_p: float) -> float:
    """Checks a dropout probability and returns it as a number.

    Raises:
        ValueError: It is not in [0, 1].
        TypeError: It is a tensor whose gradient would be lost.
    """
    dropout_p = constant(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    return dropout_p


def check_choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the `known` ones."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {known}, got {value!r}")
