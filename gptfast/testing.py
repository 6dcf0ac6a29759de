"""The error budget: a kernel's error is at most 2 times (gradients: 3) torch's in the same dtype.

Errors are measured against the oracle, the reference in float64. One rounding of the largest value
is added to torch's error, so that the budget is not 0 where torch happens to be exact.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Tensor]

RESULT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def error(actual: Tensor, oracle: Tensor) -> float:
    """Returns the largest absolute difference, computed in float64."""
    return (actual.double() - oracle).abs().max().item() if oracle.numel() else 0.0


def assert_budget(
    name: str,
    actual: Tensor,
    torch_own: Tensor,
    oracle: Tensor,
    factor: float,
    scale: float | None = None,
) -> None:
    """Asserts shape, dtype and an error of at most `factor` times (torch's error + one rounding).

    The rounding is that of a value of size `scale`, or of the oracle's largest value if None.
    """
    assert actual.shape == oracle.shape, name
    assert actual.dtype == torch_own.dtype, name
    assert torch.isfinite(actual).all(), name
    if not oracle.numel():
        return
    largest = oracle.abs().max().item() if scale is None else scale
    rounding = torch.finfo(actual.dtype).eps * largest
    budget = factor * (error(torch_own, oracle) + rounding)
    assert error(actual, oracle) <= budget, (
        f"{name}: error {error(actual, oracle):.3g} > {budget:.3g}"
    )


def autocast(op: Op) -> Op:
    """Wraps `op` in torch's CPU autocast to bfloat16."""

    def call(*args: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return op(*args, **options)

    return call


def check_results(
    actual: Sequence[Tensor],
    torch_own: Sequence[Tensor],
    oracle: Sequence[Tensor],
    gradient_scale: float | None = None,
) -> None:
    """Asserts the budget for a result, the first item of each list, and for its gradients."""
    for i, (a, t, o) in enumerate(zip(actual, torch_own, oracle, strict=True)):
        if i == 0:
            assert_budget("result", a, t, o, RESULT_FACTOR)
        else:
            assert_budget(f"gradient {i - 1}", a, t, o, GRADIENT_FACTOR, gradient_scale)


def run(
    op: Op,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype | None,
    grad: Tensor,
    **options: Any,
) -> list[Tensor]:
    """Returns the op's result and the gradients of all floating-point inputs.

    Inputs are converted to `dtype` first, unless it is None; their strides are kept.
    """

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None or not x.dtype.is_floating_point:
            return x
        return x.detach().to(dtype or x.dtype).requires_grad_()

    leaves = [leaf(x) for x in inputs]
    out = op(*leaves, **options)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def check_op(
    fused: Op,
    reference: Op,
    torch_own: Op,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    activations: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Asserts the budget for `fused` and its gradients; `inputs` are rounded to `dtype` first.

    If `activations` is given, only the inputs at these indices are rounded.
    """
    chosen = range(len(inputs)) if activations is None else activations
    rounded = [
        x.to(dtype) if x is not None and x.dtype.is_floating_point and i in chosen else x
        for i, x in enumerate(inputs)
    ]
    with torch.no_grad():
        shape = fused(*rounded, **options)
    grad = torch.randn(shape.shape, generator=torch.Generator().manual_seed(9), device="cpu")
    grad = grad.to(shape.device, dtype)
    oracle = run(reference, rounded, torch.float64, grad, **options)
    own = run(torch_own, rounded, None, grad, **options)
    actual = run(fused, rounded, None, grad, **options)
    check_results(actual, own, oracle)
