"""Connects the operators to autograd, to torch.func's transforms and to torch.compile.

An operator and its backward are two torch operators. A `Fused` function joins them: it saves what
the backward reads, and raises BackendError for second derivatives and forward-mode differentiation,
which the kernels do not support and the reference does.
"""

from collections.abc import Callable
from types import new_class
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gptfast.checks import as_number
from gptfast.errors import BackendError


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active.

    False while torch.compile traces, because it traces the transforms as well.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd or a transform may need the gradient of one of these tensors.

    True inside any transform: a tensor inside `vmap` does not show what outer transforms need.
    """
    if transformed():
        return True
    if torch.is_grad_enabled():
        for t in tensors:  # any() of a generator takes a microsecond
            if t is not None and t.requires_grad:
                return True
    return False


def constant(op: str, name: str, value: Any) -> float:
    """Converts an argument that the kernels need as a number; a tensor must have one element.

    Raises:
        TypeError: `value` is no number, or a tensor that may need a gradient, which the kernels do
            not compute.
    """
    if isinstance(value, Tensor) and needs_grad(value):
        raise TypeError(
            f"{op}: {name} must be a number, got a tensor that may need a gradient; the kernels"
            f" have none for it, gptfast.ops.reference.{op} treats it as torch does"
        )
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if torch.compiler.is_compiling():  # the number may have a symbol
        return value
    number = value if type(value) is float else as_number(value)
    if number is None:
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return number


class Fused(torch.autograd.Function):
    """An autograd function that joins an operator and its backward; `op` is its public name.

    `forward` returns the result and the tensors that the backward reads, because torch.func
    requires that saved tensors are inputs or outputs; `setup_context` saves them.
    """

    op = ""
    generate_vmap_rule = True
    _in_transforms: type["Fused"]  # a subclass with `jvp`, which torch.compile does not support

    def __init_subclass__(cls) -> None:
        if "jvp" not in vars(cls):
            refusing = {"jvp": staticmethod(lambda ctx, *tangents: refuse(cls.op))}
            cls._in_transforms = new_class(
                cls.__name__, (cls,), exec_body=lambda own: own.update(refusing)
            )

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Like `apply`, but if possible does not inspect `forward`'s signature (10 us)."""
        if torch.compiler.is_compiling():
            return cls.apply(*args)
        if transformed():
            return cls._in_transforms.apply(*args)
        plain: Any = super(torch.autograd.Function, cls)
        return plain.apply(*args)


class _Backward(torch.autograd.Function):
    """Calls a backward, and raises BackendError if its results are differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, operator: Callable[..., Any], *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        refuse(ctx.op)


def backward_of(op: str, operator: Callable[..., Any], *args: Any) -> Any:
    """Calls a backward such that differentiating its results raises BackendError.

    (torch's `once_differentiable` raises only if the incoming gradient requires a gradient, and the
    gradient of a loss does not.)
    """
    if transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return _Backward.apply(op, operator, *args)
    return operator(*args)


def refuse(op: str) -> Any:
    """Raises BackendError: the kernels do not support this derivative."""
    raise BackendError(
        f"{op}: the fused kernels have neither second derivatives nor forward mode;"
        f" gptfast.ops.reference.{op} (a model with backend='reference') has both"
    )


def nothing(ctx: Any) -> tuple[None, ...]:
    """The gradients of a function whose result has none itself: None for each input."""
    return (None,) * len(ctx.needs_input_grad)


def wanted(needs: tuple[bool, ...]) -> int:
    """Encodes which gradients a backward must compute: bit i is set if result i is needed."""
    if False not in needs:
        return (1 << len(needs)) - 1
    return sum(1 << i for i, need in enumerate(needs) if need)


def only_wanted(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Replaces the gradients that are not needed, empty tensors from the backward, by None."""
    if False not in needs:
        return list(grads)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def vmap_in_a_loop(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the operator's rule for `torch.vmap`: one call per slice, with stacked results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        pairs = list(zip(args, in_dims, strict=True))

        def call(at: Callable[[Tensor, int], Tensor]) -> Any:
            own = (arg if dim is None else at(arg, dim) for arg, dim in pairs)
            return operator(*own)

        if info.batch_size == 0:  # a call on zeros finds the shapes
            found = call(lambda x, dim: x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :]))
            empty = lambda x: x.new_empty(0, *x.shape)  # noqa: E731
            stacked: Any = empty(found) if isinstance(found, Tensor) else tuple(map(empty, found))
        else:
            slices = [
                call(lambda x, dim, i=i: x.select(dim, i).contiguous())  # type: ignore[misc]
                for i in range(info.batch_size)
            ]
            if isinstance(slices[0], Tensor):
                return torch.stack(slices), 0
            stacked = tuple(map(torch.stack, zip(*slices, strict=True)))
        return stacked, 0 if isinstance(stacked, Tensor) else (0,) * len(stacked)

    return rule
