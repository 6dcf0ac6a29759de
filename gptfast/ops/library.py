"""The torch library in which the operators are defined and their kernels registered."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gptfast.ops import flops as formulas
from gptfast.ops.autograd import transformed, vmap_in_a_loop

LIBRARY = torch.library.Library("gptfast", "DEF")
# Python kernels by (operator, is_cuda); `define`'s functions call them directly, without torch's
# dispatcher.
KERNELS: dict[tuple[str, bool], Callable[..., Any]] = {}
NUMBERS = {int, float, bool, str, torch.dtype, type(None)}
PLAIN = NUMBERS | {Tensor, torch.nn.Parameter}
# Public functions by name, and their faster replacements for calls without gradients, by (name,
# is_cuda).
PUBLIC: dict[str, Callable[..., Any]] = {}
INSTEAD: dict[tuple[str, bool], Callable[..., Any]] = {}

Function = TypeVar("Function", bound=Callable[..., Any])


def define(schema: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None) -> Any:
    """Defines the operator gptfast::<schema> and returns a function that calls it.

    Kernels are registered elsewhere: for the CPU by the compiled extension, for CUDA by
    gptfast.ops.triton. torch's dispatcher takes some 10 us to reach a kernel in Python. The
    function bypasses it where nothing would notice; its callers handle gradients.

    Args:
        schema: The schema in torch's notation.
        fake: A function that returns results of the right shapes and dtypes, without computing.
        flops: The operator's FLOP formula; see gptfast.ops.flops.
    """
    name = schema.partition("(")[0].strip()
    LIBRARY.define(" ".join(schema.split()))
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.gptfast, name).default
    torch.library.register_vmap(f"gptfast::{name}", vmap_in_a_loop(operator), lib=LIBRARY)
    if flops is not None:
        formulas.FORMULAS[name] = flops

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and isinstance(args[0], Tensor):
            kernel = KERNELS.get((name, args[0].is_cuda))
            if kernel is not None and unobserved(args):
                return kernel(*args)
        return operator(*args)

    return call


def public(function: Function) -> Function:
    """Decorates a public function: a plan may replace calls that need no gradient.

    Such a call must be `unobserved`. Only the first calls of a signature check the arguments; see
    gptfast.ops.triton.plans.
    """
    name = function.__name__
    PUBLIC[name] = function

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and args and isinstance(args[0], Tensor):
            instead = INSTEAD.get((name, args[0].is_cuda))
            if (
                instead is not None
                and NUMBERS.issuperset(map(type, options.values()))
                and not (torch.is_grad_enabled() and any(map(_requires_grad, args)))
                and unobserved(args)
            ):
                return instead(*args, **options)
        return function(*args, **options)

    return cast(Function, call)


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


_functions, _dispatches = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_traced, _profiled = torch._C._get_tracing_state, torch._C._autograd._profiler_enabled


def unobserved(args: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments may go straight to a kernel.

    It may not with subclasses of tensors, such as fake ones, nor while a mode, a transform of
    torch.func, a tracer or a profiler is active.
    """
    return PLAIN.issuperset(map(type, args)) and not (
        _dispatches() or _functions() or transformed() or _traced() is not None or _profiled()
    )
