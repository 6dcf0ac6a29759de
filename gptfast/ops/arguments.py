"""What the operators take: a table of tensors for each, and the check of a call against it.

The tables say what a call means: an error names the operator, the argument, what was expected and
what it got. The C++ checks once more that no kernel leaves a tensor's memory, because calls of
`torch.ops.gptfast` do not pass through here.
"""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from gptfast.checks import as_int, shortened
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


def affine(weight: str, bias: str, shape: str) -> dict[str, Argument]:
    """Returns a table's entries for a weight and its optional bias, of the weight's first size."""
    return {weight: parameter(shape), bias: parameter(shape.split()[0], optional=True)}


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
        self._sizes = _sizes_function(arguments)

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
        if not torch.compiler.is_compiling():
            try:
                return self._sizes(*tensors)
            except (AttributeError, ValueError):
                pass  # `_check_each` finds the wrong argument and words the error
        return self._check_each(tensors)

    def _check_each(self, tensors: tuple[Tensor | None, ...]) -> dict[str, Any]:
        """Checks one argument after the other as `check` does, so that an error can name it."""
        found: dict[str, Any] = {}
        first: Any = tensors[0]
        if not isinstance(first, Tensor) or not first.dtype.is_floating_point:
            self._check_kind(self._rows[0][0], first, None)
        dtype, device = first.dtype, first.device
        for row, x in zip(self._rows, tensors, strict=True):
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
            for letter, size in zip(letters, shape, strict=True):
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
        """Raises an error that names as much of the expected shape as is known so far."""
        leading = self._arguments[name].shape.startswith("...")
        got = tuple(x.shape)
        if len(got) == len(letters) and not leading:
            found = dict(zip(letters, got, strict=True)) | found  # an unknown size may be anything
        if all(letter in found for letter in letters) and (not leading or "..." in found):
            shape = (*(found["..."] if leading else ()), *(found[letter] for letter in letters))
            raise ValueError(f"{self.op}: {name} must have shape {shape}, got {got}")
        number = f"{'at least ' if leading else ''}{len(letters)}"
        dimensions = "dimension" if len(letters) == 1 else "dimensions"
        raise ValueError(f"{self.op}: {name} must have {number} {dimensions}, got shape {got}")


def _row(name: str, argument: Argument) -> tuple[Any, ...]:
    """Returns an argument's entries for `Table._check_each`, in the order that it unpacks."""
    sizes = re.findall(r"(\d*)(\w+)", argument.shape)
    letters = tuple(factor + letter for factor, letter in sizes)
    multiples = tuple((factor + letter, int(factor), letter) for factor, letter in sizes if factor)
    kind, leading = argument.kind, argument.shape.startswith("...")
    own_dtype = {Kind.PARAMETER: torch.float32, Kind.INDICES: torch.int64}.get(kind)
    as_first, contiguous = kind is not Kind.INDICES, kind is Kind.PARAMETER
    return name, letters, len(letters), leading, multiples, own_dtype, as_first, contiguous


def _sizes_function(arguments: dict[str, Argument]) -> Callable[..., dict[str, Any]]:
    """Makes a function that checks a table's tensors as `Table.check` does, but faster.

    It raises a ValueError without a message, or an AttributeError, where anything is not as
    expected. It is a few lines of Python without a loop, because every operator calls it and some
    operators take microseconds. For q="B H Tq D", k="B H Tk D" it does this:

        dtype, device = q.dtype, q.device
        B, H, Tq, D, = q.shape
        if q.shape != (B, H, Tq, D,) or not (q.dtype.is_floating_point): raise ValueError
        _, _, Tk, _, = k.shape
        if k.shape != (B, H, Tk, D,) or not (k.dtype is dtype) or k.device != device:
            raise ValueError
        return {"B": B, "H": H, "Tq": Tq, "D": D, "Tk": Tk}
    """
    first = next(iter(arguments))
    lines = [f"dtype, device = {first}.dtype, {first}.device"]
    known: list[str] = []
    for name, argument in arguments.items():
        _, letters, count, leading, multiples, own_dtype, as_first, contiguous = _row(
            name, argument
        )
        factors = {multiple: f"{n} * {letter}" for multiple, n, letter in multiples}
        new = [letter for letter in letters if letter not in (*known, *factors)]
        steps, dims = [], [factors.get(letter, letter) for letter in letters]
        if leading:
            dims.insert(0, "*leading")
            if "leading" not in known:
                steps.append(f"leading = {name}.shape[:{-count or None}]")
                known.append("leading")
        assert not (new and argument.optional), f"{name} may be None, but gives {new} their sizes"
        if new:
            unpacked = ["*_"] * leading + [each if each in new else "_" for each in letters]
            steps.append(f"{', '.join(unpacked)}, = {name}.shape")
            known += new
        dtypes = [f"{name}.dtype is dtype"] * as_first
        if own_dtype is not None:
            dtypes.append(f"{name}.dtype is {str(own_dtype).removeprefix('torch.')}")
        if name == first or argument.kind is Kind.FLOATING:
            dtypes = [f"{name}.dtype.is_floating_point"]
        wrong = [f"{name}.shape != ({', '.join(dims)},)", f"not ({' or '.join(dtypes)})"]
        wrong += [f"{name}.device != device"] * (name != first)
        wrong += [f"not {name}.is_contiguous()"] * contiguous
        steps.append(f"if {' or '.join(wrong)}: raise ValueError")
        if argument.optional:
            steps = [f"if {name} is not None:", *(f"    {step}" for step in steps)]
        lines += steps
    pairs = (f"{'...' if each == 'leading' else each!r}: {each}" for each in known)
    lines.append(f"return {{{', '.join(pairs)}}}")
    scope: dict[str, Any] = {"float32": torch.float32, "int64": torch.int64}
    exec("\n    ".join([f"def sizes({', '.join(arguments)}):", *lines]), scope)
    made: Callable[..., dict[str, Any]] = scope["sizes"]
    return made


def check_int(op: str, name: str, value: Any) -> int:
    """Returns an argument that is a whole number as an int. Raises TypeError where it is none."""
    number = as_int(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise TypeError(f"{op}: {name} must be a whole number (int64), got {shortened(value)}")
    return number


def check_dropout(op: str, dropout_p: float, name: str = "dropout_p") -> float:
    """Checks a dropout probability and returns it as a number.

    Raises:
        ValueError: It is not in [0, 1].
        TypeError: It is no number, or a tensor whose gradient would be lost.
    """
    dropout_p = constant(op, name, dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {dropout_p}")
    return dropout_p


def check_smoothing(op: str, label_smoothing: float) -> float:
    """Checks the part of a target's probability that all tokens share, and returns it as a number.

    Raises:
        ValueError: It is not in [0, 1).
        TypeError: It is no number, or a tensor whose gradient would be lost.
    """
    label_smoothing = constant(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    return label_smoothing


def check_choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the `known` ones."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {known}, got {value!r}")
