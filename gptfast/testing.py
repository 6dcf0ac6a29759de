"""The error budget: a kernel errs at most 2 times (gradients: 3) as much as torch in its dtype.

The oracle is the reference in float64. One rounding of the largest value is added to torch's own
error, so that a case that torch happens to get exactly right does not ask for exactness.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Tensor]

RESULT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def error(actual: Tensor, oracle: Tensor) -> float:
    """The largest absolute difference, in float64."""
    return (actual.double() - oracle).abs().max().item() if oracle.numel() else 0.0


def assert_budget(
    name: str,
    actual: Tensor,
    torch_own: Tensor,
    oracle: Tensor,
    factor: float,
    scale: float | None = None,
) -> None:
    """Asserts shape, dtype and an error within `factor` times (torch's error + one rounding).

    `scale` is the value that is rounded, the oracle's largest when None.
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
    """`op` as torch computes it in bfloat16 on parameters in float32."""

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
    """Holds a result, the first of each list, and the gradients that follow it to the budget."""
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
    """The op's result and the gradients of all floating inputs, in `dtype`, strides preserved.

    Each input stays in its own dtype when `dtype` is None.
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
    """Holds `fused` and its gradients to the budget; `inputs` are rounded to `dtype` first.

    Where `activations` says which of the inputs are some, the others stay as they are.
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
