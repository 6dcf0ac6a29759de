"""Linear layers: LayerNorm before, or bias, GELU, dropout and residual after the product.

The statistics of LayerNorm are a pass of their own over x, 1 / N of the product's work; they are
applied as the product's operand is read. The gradient of a weight is summed over parts of the rows
by programs that take several tiles each, then over the parts in their order.

Letters: M rows of an activation (all leading dimensions), K its columns, N columns of the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import (
    absent,
    config,
    dropout_args,
    precision,
    programs,
    tuned,
    wants,
)
from gptfast.ops.triton.rows import add_parts, moments, norm_grad
from gptfast.ops.triton.tiles import dropout_factors, gelu, normalized, own_tile, product

Norm = tuple[Tensor, Tensor, Tensor, Tensor | None]  # mean, rstd, weight and bias of a LayerNorm
NO_NORM = (None, None, None, None)
LEAST_PART = 512  # rows that a part of a weight's gradient has at least


def product_kind(args: Any) -> int:
    """Bytes of an element."""
    return args["a"].element_size()


def product_shared(args: Any) -> int:
    """Bytes of the operands' tiles that `tiles.product` has in shared memory."""
    tiles = (args["BM"] + args["BN"]) * args["BK"]
    return args["num_stages"] * tiles * args["a"].element_size()


PRODUCT = {
    2: [
        config(8, 3, BM=128, BN=128, BK=32, GROUP=8),
        config(8, 3, BM=64, BN=64, BK=64, GROUP=8),
    ],
    4: [config(8, 2, BM=64, BN=64, BK=32, GROUP=8)],
}


@tuned(PRODUCT, product_kind, product_shared, ["N", "K", "PRECISION"])
@triton.jit(do_not_specialize=["M", "substream", "threshold"])
def linear_kernel(
    a, b, y, before, bias, residual, mean, rstd, norm_weight, norm_bias, M, N, K,
    b_row, b_column, seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of Y = residual + dropout(gelu(norm(A) B + bias)), each part but A B optional.

    `before`, where given, receives what GELU is applied to.
    """
    m, n, m0, n0 = own_tile(M, N, BM, BN, GROUP)
    acc = product(
        a, b, mean, rstd, norm_weight, norm_bias, m, n, M, N, K, b_row, b_column,
        PRECISION, BM, BN, BK,
    )  # fmt: skip
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if before is not None:
        tl.store(before + at, acc.to(before.dtype.element_ty), mask=inside)
    if GELU is not None:
        acc = gelu(acc, GELU)
    if seed is not None:
        acc *= dropout_factors(tl.load(seed), substream, 0, m0, n0, threshold, keep_scale, BM, BN)
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


NO_DROPOUT: dict[str, Any] = dropout_args(0.0, None, 0, None)


def multiply(
    a: Tensor, b: Tensor, *, norm: Norm | None = None,
    bias: Tensor | None = None, gelu: str | None = None, before: Tensor | None = None,
    dropout: dict[str, Any] = NO_DROPOUT, residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """residual + dropout(gelu(norm(a) b + bias)), as `linear_kernel` says.

    Args:
        a: (..., K), contiguous.
        b: (K, N), any strides; converted to a's dtype where it has another.
        norm: The LayerNorm before.
        before: (..., N), receives what GELU is applied to.

    Returns:
        (..., N) in `dtype`, a's where that is None.
    """
    (K, N), b = b.shape, b.to(a.dtype)
    M, y = a.numel() // K, a.new_empty(*a.shape[:-1], N, dtype=dtype)
    if y.numel():
        grid = lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)  # noqa: E731
        linear_kernel[grid](
            a, b, y, before, bias, residual, *(norm or NO_NORM), M, N, K, *b.stride(),
            **dropout, GELU=gelu, PRECISION=precision(),
        )  # fmt: skip
    return y


def _weight_grad_shared(args: Any) -> int:
    tiles = (args["BN"] + args["BK"]) * args["BM"]
    return args["num_stages"] * tiles * args["dy"].element_size()


WEIGHT_GRAD = {
    2: [config(8, 3, BN=128, BK=64, BM=32), config(8, 2, BN=64, BK=64, BM=32)],
    4: [config(8, 2, BN=64, BK=64, BM=32)],
}


@tuned(
    WEIGHT_GRAD,
    lambda args: args["dy"].element_size(),
    _weight_grad_shared,
    ["N", "K", "PRECISION"],
)
@triton.jit
def weight_grad_kernel(
    dy, x, dweight, dbias, mean, rstd, norm_weight, norm_bias, M, N, K, rows, parts,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dW = dY' norm(X), and db = column sums of dY, over each part of `rows` rows.

    Programs stay and take every num_programs-th tile of every part.
    """
    across, down = tl.cdiv(K, BK), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), across * down * parts, tl.num_programs(0)):
        part = tile // (across * down)
        n0, k0 = tile % (across * down) // across * BN, tile % across * BK
        n, k = n0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
        first = part * rows
        last = tl.minimum(first + rows, M)
        acc = tl.zeros([BN, BK], tl.float32)
        sums = tl.zeros([BN], tl.float32)
        for m0 in tl.range(first, last, BM):
            m = m0 + tl.arange(0, BM)
            row = m.to(tl.int64)[:, None]
            d = tl.load(
                dy + row * N + n[None, :], mask=(m < last)[:, None] & (n < N)[None, :], other=0.0
            )
            value = tl.load(
                x + row * K + k[None, :], mask=(m < last)[:, None] & (k < K)[None, :], other=0.0
            )
            if mean is not None:
                row_mean = tl.load(mean + m, mask=m < last, other=0.0)
                row_rstd = tl.load(rstd + m, mask=m < last, other=0.0)
                y = normalized(
                    value.to(tl.float32), row_mean, row_rstd, norm_weight, norm_bias, k, k < K
                )
                value = y.to(value.dtype)
            acc = tl.dot(tl.trans(d), value, acc, input_precision=PRECISION)
            if dbias is not None:
                sums += tl.sum(d.to(tl.float32), 0)
        at = tl.cast(part, tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
        inside = (n < N)[:, None] & (k < K)[None, :]
        tl.store(dweight + at, acc.to(dweight.dtype.element_ty), mask=inside)
        if dbias is not None:
            tl.store(dbias + part * N + n, sums, mask=n < tl.where(k0 == 0, N, 0))


def weight_grads(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    norm: Norm | None = None, out: Tensor | None = None, wanted: int = 0b11,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of weight (N, K) and bias (N,) of a layer on norm(x), from that of its output.

    Args:
        dy: (..., N), contiguous.
        x: (..., K), contiguous.
        weight: Tells the gradient's dtype, as `bias` does; an absent one has an empty gradient.
        norm: The LayerNorm before.
        out: Receives the weight's gradient, where given.
        wanted: Bit 0 stands for the weight's, bit 1 for the bias's; the others are empty.
    """
    if not wants(wanted, 0):  # a sum over the rows alone
        if bias is None or not wants(wanted, 1):
            return absent(x), absent(x)
        return absent(x), dy.flatten(0, -2).sum(0, dtype=torch.float32).to(bias.dtype)
    N, K = weight.shape
    M = x.numel() // K
    workers = programs(x.device)
    tiles = triton.cdiv(N, 128) * triton.cdiv(K, 64)
    parts = max(1, min(triton.cdiv(workers, tiles), M // LEAST_PART))
    out = torch.empty_like(weight) if out is None else out
    dweight = out if parts == 1 else dy.new_empty(parts, N, K, dtype=torch.float32)
    with_bias = bias is not None and wants(wanted, 1)
    dbias = dy.new_empty(parts, N, dtype=torch.float32) if with_bias else None
    weight_grad_kernel[(workers,)](
        dy, x, dweight, dbias, *(norm or NO_NORM), M, N, K, max(1, triton.cdiv(M, parts)),
        parts, PRECISION=precision(),
    )  # fmt: skip
    if parts > 1:
        add_parts(dweight, out)
    if bias is None or dbias is None:
        return out, absent(x)
    return out, add_parts(dbias, torch.empty_like(bias))


def linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """gptfast::linear."""
    x = x.contiguous()
    mean, rstd = (absent(x), absent(x)) if norm_weight is None else moments(x)
    norm = None if norm_weight is None else (mean, rstd, norm_weight, norm_bias)
    residual = None if residual is None else residual.contiguous()
    return multiply(x, weight.t(), norm=norm, bias=bias, residual=residual), mean, rstd


def linear_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor,
    rstd: Tensor, weight: Tensor, bias: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_backward."""
    x, dy = x.contiguous(), dy.contiguous()
    norm = None if norm_weight is None else (mean, rstd, norm_weight, norm_bias)
    params = weight_grads(dy, x, weight, bias, norm, wanted=wanted >> 3)
    if not wants(wanted, 0, 2):
        return x.new_empty(0), absent(x), absent(x), *params
    dx = multiply(dy, weight)
    if norm is None:
        return dx, absent(x), absent(x), *params
    return *norm_grad(dx, x, None, *norm, wanted=wanted), *params
