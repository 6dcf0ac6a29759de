"""Linear layers with what surrounds them, and the FFN, against cuBLAS and torch.compile.

"cuBLAS alone" multiplies without norm, bias or residual: the least that a product takes.
Letters: M rows, K inner and N outer columns.
"""

import functools
from collections.abc import Iterator

import torch
from bench_ffn import ffn
from common import OURS, Case, Results, Row, compare, compiled, random_tensors, wide, work
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import Op

NORMED = ((16384, 768, 2304), (16384, 768, 3072), (16384, 768, 50304), (4096, 384, 1536))
RESIDUAL = ((16384, 3072, 768),)
WITH_GRADIENTS = ((16384, 768, 2304),)
FFN = (16384, 768)
ALONE = "cuBLAS alone"


def normed(x: Tensor, ln_w: Tensor, ln_b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LN(x) weight' + bias in torch ops."""
    return F.linear(F.layer_norm(x, x.shape[-1:], ln_w, ln_b), weight, bias)


def residual(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor) -> Tensor:
    """x weight' + bias + added in torch ops."""
    return added + F.linear(x, weight, bias)


def layer_norm_linear(M: int, K: int, N: int, backward: bool, dtype: str) -> Case:
    """Makes the case of a linear layer after a norm."""
    x, ln_w, ln_b, bias, grad = random_tensors((M, K), (K,), (K,), (N,), (M, N), dtype=dtype)
    (weight,) = random_tensors((N, K), dtype=dtype, scale=K**-0.5)
    inputs = [x, ln_w, ln_b, weight, bias]
    return layer(
        ops.layer_norm_linear,
        reference.layer_norm_linear,
        normed,
        inputs,
        3,
        grad if backward else None,
        dtype,
    )


def linear_residual(M: int, K: int, N: int, backward: bool, dtype: str) -> Case:
    """Makes the case of a linear layer with a residual."""
    x, bias, added, grad = random_tensors((M, K), (N,), (M, N), (M, N), dtype=dtype)
    (weight,) = random_tensors((N, K), dtype=dtype, scale=K**-0.5)
    inputs = [x, weight, bias, added]
    return layer(
        ops.linear_residual,
        reference.linear_residual,
        residual,
        inputs,
        1,
        grad if backward else None,
        dtype,
    )


def layer(
    ours: Op, exact: Op, theirs: Op, inputs: list[Tensor], at: int, grad: Tensor | None, dtype: str
) -> Case:
    """Makes the case of a layer, forward and, unless `grad` is None, backward.

    Args:
        ours: The operator of gptfast.
        exact: The reference.
        theirs: The same in torch ops.
        inputs: Arguments of all three; the first is x, (M, K).
        at: The index of the weight, (N, K).
        grad: The gradient of the result, (M, N).
        dtype: See `Row`.
    """
    x, weight = inputs[0], inputs[at]
    factor = 1 if grad is None else 3
    contenders: dict[str, Results] = {
        OURS: work(ours, inputs, grad),
        "torch": work(theirs, inputs, grad),
        "torch.compile": work(compiled(theirs), inputs, grad),
    }
    oracle = work(exact, [wide(t) for t in inputs], None if grad is None else wide(grad))
    flops = factor * 2 * x.numel() * weight.shape[0]
    case = compare(contenders, oracle, flops, dtype, checked=dict(contenders))
    case.compiles = ("torch.compile",)
    case.contenders[ALONE] = functools.partial(alone, x, weight, grad)
    case.other_dtype = (ALONE,)  # it does less
    return case


@torch.no_grad()
def alone(x: Tensor, weight: Tensor, grad: Tensor | None) -> None:
    """The products of a layer, and of its gradients, by cuBLAS."""
    F.linear(x, weight)
    if grad is not None:
        grad @ weight
        grad.t() @ x


def rows(full: bool) -> Iterator[Row]:
    """Yields the rows."""
    for make, shapes in ((layer_norm_linear, NORMED), (linear_residual, RESIDUAL)):
        for shape in shapes:
            for backward in (False, True):
                if backward and not full and shape not in (*WITH_GRADIENTS, *RESIDUAL):
                    continue
                what = make.__name__.replace("_", " ")
                name = f"{what} {'x'.join(map(str, shape))}{' forward+backward' * backward}"
                for dtype in ("bf16", "fp32") if full else ("bf16",):
                    yield Row(name, dtype, functools.partial(make, *shape, backward, dtype))
    name = f"LN+FFN+residual {'x'.join(map(str, FFN))} forward+backward"
    yield Row(name, "bf16", functools.partial(ffn, *FFN, "bf16"))
