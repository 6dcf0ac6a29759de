"""Weights in the dtype of the activations: copies that live as long as the call that needs them.

Letters: V rows and K columns of a weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import cdiv, kernel

BLOCK = 4096  # elements of a program


@triton.jit
def _copy(x, y, start, n, size, BLOCK: tl.constexpr):
    i = start.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < size)


@kernel
@triton.jit
def cast_kernel(x, y, n, size, x2, y2, n2, BLOCK: tl.constexpr):
    """Copies the n elements of x to y, of another dtype, and zeros up to `size`; x2 to y2 likewise.

    x2 is optional.
    """
    block, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if block < blocks:
        _copy(x, y, block, n, size, BLOCK)
    elif x2 is not None:
        _copy(x2, y2, block - blocks, n2, n2, BLOCK)


def cast(dtype: torch.dtype, weight: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two contiguous weights in `dtype`; one launch converts both if need be."""
    alike = weight.dtype == dtype or other.dtype == dtype
    if alike or not (weight.is_contiguous() and other.is_contiguous()):
        return weight.to(dtype), other.to(dtype)
    results = torch.empty_like(weight, dtype=dtype), torch.empty_like(other, dtype=dtype)
    _launch(weight, results[0], other, results[1])
    return results


def padded(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Returns a contiguous weight (V, K) in `dtype`, with rows of zeros up to (rows, K)."""
    V, K = weight.shape
    if rows == V:
        return weight.to(dtype)
    weight = weight.contiguous()
    result = weight.new_empty(rows, K, dtype=dtype)
    _launch(weight, result, None, None)
    return result


def _launch(x: Tensor, y: Tensor, x2: Tensor | None, y2: Tensor | None) -> None:
    n2: Any = 0 if x2 is None else x2.numel()
    blocks = cdiv(y.numel(), BLOCK) + cdiv(n2, BLOCK)
    if blocks:
        cast_kernel[(blocks,)](
            x, y, x.numel(), y.numel(), x2, y2, n2, BLOCK=BLOCK, num_warps=8
        )  # fmt: skip
