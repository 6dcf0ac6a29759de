"""Linear layers, fused with a preceding LayerNorm and with bias, GELU, dropout and residual.

A separate pass over x computes LayerNorm's statistics, at 1 / N of the product's work; x is
normalised while the product reads it. The gradient of a weight is summed over each part of the rows
by programs that loop over tiles, then over the parts in order.

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
from gptfast.ops.triton.rows import add_parts, moments, norm_backward
from gptfast.ops.triton.tiles import dropout_factors, gelu, normalized, own_tile, product

Norm = tuple[Tensor, Tensor, Tensor, Tensor | None]  # mean, rstd, weight and bias of a LayerNorm
NO_NORM = (None, None, None, None)
MIN_PART = 512  # minimum number of rows per part of a weight's gradient


def product_kind(args: Any) -> int:
    """Returns the kind of a product for `tuned`: bytes per element."""
    return args["a"].element_size()


def product_shared(args: Any) -> int:
    """Returns the bytes of operand tiles that `tiles.product` keeps in shared memory."""
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
    a, b, y, before, bias, residual, mean, rstd, ln_w, ln_b, M, N, K,
    b_row, b_column, seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of Y = residual + dropout(gelu(norm(A) B + bias)); everything but A B is optional.

    `before`, if given, receives the input of GELU.
    """
    m, n, m0, n0 = own_tile(M, N, BM, BN, GROUP)
    acc = product(
        a, b, mean, rstd, ln_w, ln_b, m, n, M, N, K, b_row, b_column,
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
    """Computes residual + dropout(gelu(norm(a) b + bias)); see `linear_kernel`.

    Args:
        a: (..., K), contiguous.
        b: (K, N), any strides and dtype; converted to a's dtype.
        norm: The LayerNorm to apply to a.
        bias: (N,).
        gelu: "erf", "tanh", or None for no GELU.
        before: (..., N), receives the input of GELU.
        dropout: What `dropout_args` returns.
        residual: (..., N), contiguous.
        dtype: The dtype of the result; None uses a's.

    Returns:
        (..., N).
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
    dy, x, dweight, dbias, mean, rstd, ln_w, ln_b, M, N, K, rows, parts,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dW = dY' norm(X), and db = column sums of dY, over each part of `rows` rows.

    Persistent programs: each takes every num_programs-th tile of all parts.
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
                y = normalized(value.to(tl.float32), row_mean, row_rstd, ln_w, ln_b, k, k < K)
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
    """Computes the gradients of weight (N, K) and bias (N,) of a linear layer on norm(x).

    Args:
        dy: (..., N), contiguous, the gradient of the output.
        x: (..., K), contiguous.
        weight: Determines shape and dtype of its gradient.
        bias: Likewise; the gradient of an absent bias is empty.
        norm: The LayerNorm applied to x.
        out: Receives the weight's gradient, if given.
        wanted: Bit 0 requests the weight's gradient, bit 1 the bias's; others are empty.
    """
    if not wants(wanted, 0):  # only the sum over the rows
        if bias is None or not wants(wanted, 1):
            return absent(x), absent(x)
        return absent(x), dy.flatten(0, -2).sum(0, dtype=torch.float32).to(bias.dtype)
    N, K = weight.shape
    M = x.numel() // K
    workers = programs(x.device)
    tiles = triton.cdiv(N, 128) * triton.cdiv(K, 64)
    parts = max(1, min(triton.cdiv(workers, tiles), M // MIN_PART))
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
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """gptfast::linear."""
    x = x.contiguous()
    mean, rstd = (absent(x), absent(x)) if ln_w is None else moments(x)
    norm = None if ln_w is None else (mean, rstd, ln_w, ln_b)
    residual = None if residual is None else residual.contiguous()
    return multiply(x, weight.t(), norm=norm, bias=bias, residual=residual), mean, rstd


def linear_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, mean: Tensor,
    rstd: Tensor, weight: Tensor, bias: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_backward."""
    x, dy = x.contiguous(), dy.contiguous()
    norm = None if ln_w is None else (mean, rstd, ln_w, ln_b)
    params = weight_grads(dy, x, weight, bias, norm, wanted=wanted >> 3)
    if not wants(wanted, 0, 2):
        return x.new_empty(0), absent(x), absent(x), *params
    dx = multiply(dy, weight)
    if norm is None:
        return dx, absent(x), absent(x), *params
    return *norm_backward(dx, x, None, *norm, wanted=wanted), *params
