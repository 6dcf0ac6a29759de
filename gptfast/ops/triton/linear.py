"""Linear layers, fused with bias, GELU, dropout and residual; what their backwards share.

A product with something around it has a kernel of its own. LayerNorm is not part of that kernel:
its output is written first. torch computes products with nothing around them (`matmul`).

Letters: M rows of an activation (all leading dimensions), K its columns, N columns of the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton import products
from gptfast.ops.triton.launch import NO_DROPOUT, kernel, or_absent, wants
from gptfast.ops.triton.matmul import matmul
from gptfast.ops.triton.rows import Sums, column_sums, layer_norm, norm_grads
from gptfast.ops.triton.tiles import (
    dropout_factors,
    gelu,
    load_tile,
    parts_of,
    product,
    store_tile,
    tile_at,
)


@kernel
@triton.jit(do_not_specialize=["M", "substream", "threshold"])
def linear_kernel(
    a, b, M, N, K, b_row, b_column, y, before, bias, residual,
    seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, DESCRIBED: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Y = residual + dropout(gelu(A B + bias)); everything but A B is optional.

    `before`, if given, receives the input of GELU.
    """
    tl.assume(K > 0)
    COLUMNS: tl.constexpr = BN // PARTS
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    done = tl.program_id(0)  # a second count: loads of the next tile need not wait for its end
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m0, n0 = tile_at(tile, M, N, BM, BN, GROUP)
        acc = product(a, b, m0, n0, M, N, K, b_row, b_column, DESCRIBED, PRECISION, BM, BN, BK)
        m0, n0 = tile_at(done, M, N, BM, BN, GROUP)
        done += tl.num_programs(0)
        parts = parts_of(acc, BM, BN, PARTS)
        for i in tl.static_range(PARTS):
            n1 = n0 + i * COLUMNS
            if i == 0 or DESCRIBED is None:
                addend = load_tile(residual, m0, n1, M, N, BM, COLUMNS)
            part = _finished(
                parts[i], addend, m0, n1, M, N, before, bias,
                seed, substream, threshold, keep_scale, GELU, STORED, BM, COLUMNS,
            )  # fmt: skip
            if i + 1 < PARTS and DESCRIBED is not None:  # on its way while this part is stored
                addend = load_tile(residual, m0, n1 + COLUMNS, M, N, BM, COLUMNS)
            store_tile(y, part, m0, n1, M, N, STORED, BM, COLUMNS)


@triton.jit
def _finished(
    acc, addend, m0, n0, M, N, before, bias, seed, substream, threshold, keep_scale,
    GELU: tl.constexpr, STORED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Does to a part of a tile of A B what `linear_kernel` says."""
    if bias is not None:
        n = n0 + tl.arange(0, COLUMNS)
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if before is not None:
        store_tile(before, acc, m0, n0, M, N, STORED, ROWS, COLUMNS)
    if GELU is not None:
        acc = gelu(acc, GELU)
    if seed is not None:
        acc *= dropout_factors(
            tl.load(seed), substream, 0, m0, n0, threshold, keep_scale, ROWS, COLUMNS
        )
    if addend is not None:
        acc += addend.to(tl.float32)
    return acc


def multiply(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, gelu: str | None = None,
    before: Tensor | None = None, dropout: dict[str, Any] = NO_DROPOUT,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes residual + dropout(gelu(a b + bias)); see `linear_kernel`.

    Args:
        a: (..., K), contiguous.
        b: (K, N), any strides and dtype; converted to a's dtype.
        bias: (N,).
        gelu: "erf", "tanh", or None for no GELU.
        before: (..., N), receives the input of GELU.
        dropout: What `dropout_args` returns.
        residual: (..., N), contiguous.

    Returns:
        (..., N) in a's dtype.
    """
    y = a.new_empty(*a.shape[:-1], b.shape[1])
    if y.numel():
        how = products.product(a.view(-1, a.shape[-1]), b.to(a.dtype))
        linear_kernel[how.grid](
            *how.operands, how.result(y), how.result(before), bias, residual, **dropout, GELU=gelu,
            **how.options,
        )  # fmt: skip
    return y


def weight_grad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Computes the gradient of a linear layer's weight, dW = dY' X, in the weight's dtype.

    dy (..., N) and x (..., K) are contiguous and of one dtype.
    """
    dtype = weight.dtype if weight.dtype in (dy.dtype, torch.float32) else dy.dtype
    return matmul(dy.flatten(0, -2).t(), x.flatten(0, -2), dtype).to(weight.dtype)


def input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """Computes the gradient of a linear layer's input, dX = dY W, (..., K) in dy's dtype."""
    dx = matmul(dy.flatten(0, -2), weight.to(dy.dtype))
    return dx.view(*dy.shape[:-1], weight.shape[1])


def linear(
    x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, weight: Tensor,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear."""
    n = x = x.contiguous()
    mean = rstd = None
    if ln_w is not None:
        n, mean, rstd = layer_norm(x, ln_w, ln_b)
    residual = None if residual is None else residual.contiguous()
    y = multiply(n, weight.t(), bias=bias, residual=residual)
    return y, *or_absent(x, mean, rstd)


def linear_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, mean: Tensor,
    rstd: Tensor, weight: Tensor, bias: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::linear_backward."""
    x, dy, sums = x.contiguous(), dy.contiguous(), Sums()
    n, dx = x, x.new_empty(0)
    dln_w = dln_b = dweight = dbias = None
    if wants(wanted, 0, 2):
        dx = input_grad(dy, weight)
        if ln_w is not None:
            back = norm_grads(dx, x, None, mean, rstd, ln_w, ln_b, wants(wanted, 3))
            dx, n = back.dx, back.n
            dln_w, dln_b = sums.of_norm(back, ln_w, ln_b, wanted)
    elif ln_w is not None and wants(wanted, 3):
        n, _, _ = layer_norm(x, ln_w, ln_b)
    if wants(wanted, 3):
        dweight = weight_grad(dy, n, weight)
    if bias is not None and wants(wanted, 4):
        dbias = sums.of(bias, column_sums(dy))
    sums.add()
    return dx, *or_absent(x, dln_w, dln_b, dweight, dbias)
