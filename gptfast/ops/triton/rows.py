"""Row-wise kernels: LayerNorm's statistics and backward, dropout, sums of partial results.

Letters: M rows of an activation, K its columns, P parts (partial sums over rows).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.ops.triton.launch import absent, block_of, programs, wants
from gptfast.ops.triton.tiles import dropout_factors

ELEMENTS = 4096  # elements of a program's tile, unless a row is longer


def _tile(columns: int) -> dict[str, int]:
    width = block_of(columns)
    return {"BLOCK": width, "ROWS": max(1, ELEMENTS // width)}


@triton.jit(do_not_specialize=["M"])
def layer_norm_kernel(
    x, weight, bias, y, mean, rstd, M, K, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + eps), in two passes.

    Without y, mean and rstd alone.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(tile, 1) / K
    rest = tl.where(inside, tile - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(rest * rest, 1) / K + eps)
    tl.store(mean + m, average, mask=m < M)
    tl.store(rstd + m, scale, mask=m < M)
    if y is not None:
        w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
        normalized = rest * scale[:, None] * w[None, :]
        if bias is not None:
            normalized += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        tl.store(y + at, normalized.to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns LayerNorm(x) in x's dtype, and mean and rstd of the rows of x, (M,) float32.

    x (..., K) is contiguous.
    """
    y = torch.empty_like(x)
    return y, *_layer_norm(x, weight, bias, y)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and rstd of the rows of x (..., K), which is contiguous; each (M,) float32."""
    return _layer_norm(x, None, None, None)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    K = x.shape[-1]
    M = x.numel() // K
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    if M:
        tile = _tile(K)
        layer_norm_kernel[(triton.cdiv(M, tile["ROWS"]),)](
            x, weight, bias, y, mean, rstd, M, K, LAYER_NORM_EPS, **tile, num_warps=8
        )
    return mean, rstd


@triton.jit(do_not_specialize=["M"])
def norm_grad_kernel(
    dn, x, add, mean, rstd, weight, dx, dweight, dbias, M, K,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of LayerNorm plus `add`, and this program's partial gradients of the parameters.

    g = dn w,  xhat = (x - mean) rstd,  dx = rstd (g - mean(g) - xhat mean(g xhat)) + add,
    dw += dn xhat,  db += dn.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK)
    w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    weight_total = tl.zeros([BLOCK], tl.float32)
    bias_total = tl.zeros([BLOCK], tl.float32)
    for m0 in tl.range(part * ROWS, M, parts * ROWS):
        m = m0 + tl.arange(0, ROWS)
        inside = (m < M)[:, None] & (k < K)[None, :]
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        d = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + m, mask=m < M, other=0.0)
        row_rstd = tl.load(rstd + m, mask=m < M, other=0.0)
        xhat = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
        g = d * w[None, :]
        mean_g = tl.sum(g, 1) / K
        mean_gx = tl.sum(g * xhat, 1) / K
        result = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * row_rstd[:, None]
        if add is not None:
            result += tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        weight_total += tl.sum(d * xhat, 0)
        bias_total += tl.sum(d, 0)
    tl.store(dweight + part * K + k, weight_total, mask=k < K)
    tl.store(dbias + part * K + k, bias_total, mask=k < K)


def norm_backward(
    dn: Tensor, x: Tensor, add: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor | None, wanted: int = 0b111,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes the gradients of a LayerNorm's input (plus `add`), weight and bias.

    dn is the gradient of its output. All activations are contiguous (..., K). The gradient of an
    absent parameter, or of one whose bit in `wanted` (1 weight, 2 bias) is not set, is empty.
    """
    K = x.shape[-1]
    M, tile = x.numel() // K, _tile(K)
    parts = max(1, min(programs(x.device), triton.cdiv(M, tile["ROWS"])))
    dx = torch.empty_like(x)
    dweight, dbias = (x.new_empty(parts, K, dtype=torch.float32) for _ in range(2))
    norm_grad_kernel[(parts,)](
        dn, x, add, mean, rstd, weight, dx, dweight, dbias, M, K, **tile, num_warps=8
    )
    return (
        dx,
        add_parts(dweight, torch.empty_like(weight)) if wants(wanted, 1) else absent(x),
        absent(x)
        if bias is None or not wants(wanted, 2)
        else add_parts(dbias, torch.empty_like(bias)),
    )


@triton.jit
def sum_kernel(parts, out, P, n, BLOCK: tl.constexpr):
    """out_i = parts_0i + parts_1i + .., in this order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p in tl.range(0, P):
        total += tl.load(parts + tl.cast(p, tl.int64) * n + i, mask=i < n, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < n)


def add_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Adds up float32 parts (P, ...) in order, writes the sum to `out` (...) and returns it."""
    if out.numel():
        block = min(1024, block_of(out.numel()))
        sum_kernel[(triton.cdiv(out.numel(), block),)](
            parts, out, parts.shape[0], out.numel(), BLOCK=block
        )
    return out


@triton.jit(do_not_specialize=["M", "substream", "threshold"])
def dropout_kernel(
    x, y, M, K, seed, substream, threshold, keep_scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x times its dropout factors."""
    m0, k0 = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCK
    m, k = m0 + tl.arange(0, ROWS), k0 + tl.arange(0, BLOCK)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    inside = (m < M)[:, None] & (k < K)[None, :]
    factors = dropout_factors(
        tl.load(seed), substream, 0, m0, k0, threshold, keep_scale, ROWS, BLOCK
    )
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (value * factors).to(y.dtype.element_ty), mask=inside)


def dropped(x: Tensor, dropout: dict[str, Any]) -> Tensor:
    """Returns a contiguous x (..., K) times its dropout factors; x itself without dropout."""
    if dropout["seed"] is None or not x.numel():
        return x
    K, y = x.shape[-1], torch.empty_like(x)
    M, rows, block = x.numel() // K, 32, 128
    dropout_kernel[(triton.cdiv(M, rows), triton.cdiv(K, block))](
        x, y, M, K, **dropout, ROWS=rows, BLOCK=block
    )
    return y
