"""How the operators take part in autograd, in torch.func's transforms and in torch.compile.

An operator and its backward are two torch operators. A `Fused` function joins them: it keeps what
the backward reads, and refuses what the kernels do not have. Those are derivatives of a backward
(second derivatives) and forward mode, which the reference has.
"""

from collections.abc import Callable
from types import new_class
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gptfast.errors import BackendError


def transformed() -> bool:
    """Whether torch.func, or forward-mode differentiation, sees the tensors of this call.

    What torch.compile traces has its transforms traced as well.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether the gradient of one of them may be asked for, by autograd or by a transform.

    A tensor inside `vmap` does not tell what the transforms around it want.
    """
    if transformed():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def constant(op: str, name: str, value: Any) -> float:
    """An argument that is a number for the kernels, given as a number or as a tensor of one.

    Raises:
        TypeError: It is a tensor whose gradient would be lost.
    """
    if isinstance(value, Tensor):
        if needs_grad(value):
            raise TypeError(
                f"{op}: {name} must be a number, got a tensor that may need a gradient; the kernels"
                f" have none for it, gptfast.ops.reference.{op} treats it as torch does"
            )
        return value.item()
    return value


class Fused(torch.autograd.Function):
    """An operator with its backward; `op` is its public name.

    `forward` returns what the backward reads besides the result, since torch.func differentiates
    outputs alone; `setup_context` saves it.
    """

    op = ""
    generate_vmap_rule = True
    _in_transforms: type["Fused"]  # the same with a `jvp`, which torch.compile does not take

    def __init_subclass__(cls) -> None:
        if "jvp" not in vars(cls):
            refusing = {"jvp": staticmethod(lambda ctx, *tangents: refuse(cls.op))}
            cls._in_transforms = new_class(
                cls.__name__, (cls,), exec_body=lambda own: own.update(refusing)
            )

    @classmethod
    def call(cls, *args: Any) -> Any:
        """`apply`, without reading the signature of `forward` (10 us) for torch.func in vain."""
        if torch.compiler.is_compiling():
            return cls.apply(*args)
        if transformed():
            return cls._in_transforms.apply(*args)
        plain: Any = super(torch.autograd.Function, cls)
        return plain.apply(*args)


class _Backward(torch.autograd.Function):
    """The call of a backward whose results may be differentiated, which is refused."""

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
    """Calls a backward; where its results may be differentiated, that will be refused.

    (torch's own `once_differentiable` refuses only where the incoming gradient is a variable, which
    that of a loss is not.)
    """
    if transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return _Backward.apply(op, operator, *args)
    return operator(*args)


def refuse(op: str) -> Any:
    """Raises the error that the kernels have no such derivative."""
    raise BackendError(
        f"{op}: the fused kernels have neither second derivatives nor forward mode;"
        f" gptfast.ops.reference.{op} (a model with backend='reference') has both"
    )


def wanted(needs: tuple[bool, ...]) -> int:
    """The gradients that a backward is to compute, as bits: bit i stands for its i-th result."""
    return sum(1 << i for i, need in enumerate(needs) if need)


def only_wanted(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients that are wanted; a backward returns an empty tensor for each of the others."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's rule for `torch.vmap`: a call for each slice, the results stacked."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        pairs = list(zip(args, in_dims, strict=True))

        def call(at: Callable[[Tensor, int], Tensor]) -> Any:
            own = (arg if dim is None else at(arg, dim) for arg, dim in pairs)
            return operator(*own)

        if info.batch_size == 0:  # the shapes are those of any slice
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
