"""Row-wise kernels: LayerNorm and its backward, dropout, sums over the rows.

A sum over the rows of an activation is the gradient of a parameter: of LayerNorm's, or of a bias.
The kernels that read the activation anyway write partial sums of it, one per program; one more
kernel per backward adds all parts in order (`Sums`). Nothing is added atomically.

Letters: M rows of an activation, K its columns, P parts (partial sums over rows).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.ops.triton.launch import (
    NO_DROPOUT,
    block_of,
    cdiv,
    kernel,
    or_absent,
    processors,
    programs,
    wants,
)
from gptfast.ops.triton.tiles import dropout_factors

ELEMENTS = 4096  # elements of a program's tile, unless a row is longer


def _tile(columns: int) -> dict[str, int]:
    width = block_of(columns)
    return {"BLOCK": width, "ROWS": max(1, ELEMENTS // width)}


@kernel
@triton.jit(do_not_specialize=["M"])
def layer_norm_kernel(
    x, weight, bias, y, mean, rstd, M, K, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + eps), in two passes."""
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
    w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    normalized = rest * scale[:, None] * w[None, :]
    if bias is not None:
        normalized += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, normalized.to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns LayerNorm(x) in x's dtype, and mean and rstd of the rows of x, (M,) float32.

    x (..., K) is contiguous.
    """
    K = x.shape[-1]
    M, y = x.numel() // K, torch.empty_like(x)
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    if M:
        tile = _tile(K)
        layer_norm_kernel[(cdiv(M, tile["ROWS"]),)](
            x, weight, bias, y, mean, rstd, M, K, LAYER_NORM_EPS, **tile, num_warps=8
        )
    return y, mean, rstd


@kernel
@triton.jit(do_not_specialize=["M"])
def norm_grad_kernel(
    dn, x, add, mean, rstd, weight, bias, dx, n, sums, M, K,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of LayerNorm plus `add`, its output n if given, and this program's sums over rows.

    g = dn w,  xhat = (x - mean) rstd,  dx = rstd (g - mean(g) - xhat mean(g xhat)) + add,
    n = xhat w + b;  the sums are those of dn xhat (dw), dn (db) and add.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK)
    w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    weight_total = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_total = tl.zeros([ROWS, BLOCK], tl.float32)
    add_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for m0 in tl.range(part * ROWS, M, parts * ROWS, num_stages=STAGES):
        m = m0 + tl.arange(0, ROWS)
        inside = (m < M)[:, None] & (k < K)[None, :]
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        d = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + m, mask=m < M, other=0.0)
        row_rstd = tl.load(rstd + m, mask=m < M, other=0.0)
        xhat = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
        if n is not None:
            normalized = xhat * w[None, :]
            if bias is not None:
                normalized += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            tl.store(n + at, normalized.to(n.dtype.element_ty), mask=inside)
        g = d * w[None, :]
        # One reduction, because warps wait for each other in each.
        mean_g, mean_gx = tl.split(tl.sum(tl.join(g, g * xhat), 1) / K)
        result = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * row_rstd[:, None]
        if add is not None:
            other = tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
            result += other
            add_total += other
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        weight_total += d * xhat
        bias_total += d
    sums += part * 3 * K + k
    tl.store(sums, tl.sum(weight_total, 0), mask=k < K)
    tl.store(sums + K, tl.sum(bias_total, 0), mask=k < K)
    if add is not None:
        tl.store(sums + 2 * K, tl.sum(add_total, 0), mask=k < K)


class NormGrads(NamedTuple):
    """What `norm_grads` computes."""

    dx: Tensor  # the input's gradient, plus `add`
    n: Tensor  # the LayerNorm's output; empty unless asked for
    sums: Tensor  # (P, 3, K) parts of the gradients of weight and bias, and of the sum of `add`


def norm_grads(
    dn: Tensor, x: Tensor, add: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor | None, with_n: bool,
) -> NormGrads:  # fmt: skip
    """Computes the backward of n = LayerNorm(x), and n itself again, which is not kept.

    Args:
        dn: The gradient of n; like all activations contiguous (..., K).
        x: The input.
        add: The dy of a residual. It is added to the gradient of x, and summed over the rows.
        mean: The means of the rows of x, (M,).
        rstd: Their 1 / sqrt(variance + eps), (M,).
        weight: (K,).
        bias: (K,) or None.
        with_n: Whether to write n.
    """
    K = x.shape[-1]
    M, block = x.numel() // K, block_of(K)
    rows = max(1, 2048 // block)
    parts = max(1, min(3 * processors(x.device), cdiv(M, rows)))  # as many as run at a time
    dx, sums = torch.empty_like(x), x.new_empty(parts, 3, K, dtype=torch.float32)
    n = torch.empty_like(x) if with_n else None
    norm_grad_kernel[(parts,)](
        dn, x, add, mean, rstd, weight, bias, dx, n, sums, M, K,
        ROWS=rows, BLOCK=block, STAGES=2, num_warps=4,
    )  # fmt: skip
    return NormGrads(dx, x.new_empty(0) if n is None else n, sums)


@triton.jit
def _add_parts(parts, stride, P, out, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for p0 in tl.range(0, P, ROWS):
        p = p0 + tl.arange(0, ROWS)
        at = p.to(tl.int64)[:, None] * stride + i[None, :]
        total += tl.load(parts + at, mask=(p < P)[:, None] & (i < n)[None, :], other=0.0)
    tl.store(out + i, tl.sum(total, 0).to(out.dtype.element_ty), mask=i < n)


@kernel
@triton.jit(do_not_specialize=["P0", "P1", "P2", "P3", "P4"])
def add_parts_kernel(
    parts0, stride0, P0, out0, n0, parts1, stride1, P1, out1, n1,
    parts2, stride2, P2, out2, n2, parts3, stride3, P3, out3, n3,
    parts4, stride4, P4, out4, n4, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = parts_0i + parts_1i + .., in a fixed order, for up to five sums of P parts each."""
    which = tl.program_id(1)
    if which == 0:
        _add_parts(parts0, stride0, P0, out0, n0, ROWS, BLOCK)
    if parts1 is not None:
        if which == 1:
            _add_parts(parts1, stride1, P1, out1, n1, ROWS, BLOCK)
    if parts2 is not None:
        if which == 2:
            _add_parts(parts2, stride2, P2, out2, n2, ROWS, BLOCK)
    if parts3 is not None:
        if which == 3:
            _add_parts(parts3, stride3, P3, out3, n3, ROWS, BLOCK)
    if parts4 is not None:
        if which == 4:
            _add_parts(parts4, stride4, P4, out4, n4, ROWS, BLOCK)


class Sums:
    """The gradients of a backward that are sums of parts: one kernel writes them all."""

    LIMIT = 5

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def of(self, param: Tensor, *parts: Tensor) -> Tensor:
        """Returns a gradient like param (N,), which `add` computes: sums of float32 parts (P, n).

        Several parts, each of its own P, are side by side in the gradient.
        """
        out, first = torch.empty_like(param), 0
        for each in parts:
            last = first + each.shape[1]
            self._parts.append((each, out[first:last]))
            first = last
        assert first == out.numel()
        return out

    def of_norm(
        self, grads: NormGrads, weight: Tensor, bias: Tensor | None, wanted: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns a LayerNorm's gradients of weight and bias; None if not wanted (bits 1, 2)."""
        return (
            self.of(weight, grads.sums[:, 0]) if wants(wanted, 1) else None,
            self.of(bias, grads.sums[:, 1]) if bias is not None and wants(wanted, 2) else None,
        )

    def add(self) -> None:
        """Adds the parts."""
        if not self._parts:
            return
        assert len(self._parts) <= self.LIMIT
        args: list[Any] = []
        for parts, out in self._parts:
            args += [parts, parts.stride(0), parts.shape[0], out, out.numel()]
        args += [None] * (5 * (self.LIMIT - len(self._parts)))
        rows, block = 128, 32
        longest = max(out.numel() for _, out in self._parts)
        add_parts_kernel[(cdiv(longest, block), len(self._parts))](
            *args, ROWS=rows, BLOCK=block, num_warps=8
        )


def norm_backward(
    dn: Tensor, x: Tensor, add: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes the gradients of a LayerNorm's input (plus `add`), weight and bias.

    See `norm_grads`. The gradient of an absent parameter, or of one whose bit in `wanted` (1
    weight, 2 bias) is not set, is empty.
    """
    grads, sums = norm_grads(dn, x, add, mean, rstd, weight, bias, False), Sums()
    dweight, dbias = sums.of_norm(grads, weight, bias, wanted)
    sums.add()
    return grads.dx, *or_absent(x, dweight, dbias)


@kernel
@triton.jit(do_not_specialize=["M", "substream", "threshold"])
def dropout_kernel(
    x, y, sums, M, K, seed, substream, threshold, keep_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x times its dropout factors, and this program's sums of y over rows; both optional."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    k0 = tl.program_id(1) * BLOCK
    k = k0 + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for m0 in tl.range(part * ROWS, M, parts * ROWS, num_stages=STAGES):
        m = m0 + tl.arange(0, ROWS)
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            value *= dropout_factors(
                tl.load(seed), substream, 0, m0, k0, threshold, keep_scale, ROWS, BLOCK
            )
        if y is not None:
            tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
        total += value
    if sums is not None:
        tl.store(sums + part * K + k, tl.sum(total, 0), mask=k < K)


def _dropout(x: Tensor, y: Tensor | None, with_sums: bool, dropout: dict[str, Any]) -> Tensor:
    K = x.shape[-1]
    M, rows, block = x.numel() // max(1, K), 16, 128
    across = cdiv(K, block)
    parts = min(max(1, 4 * programs(x.device) // max(1, across)), cdiv(M, rows))
    sums = x.new_empty(parts if with_sums else 0, K, dtype=torch.float32)
    if x.numel():
        dropout_kernel[(parts, across)](
            x, y, sums if with_sums else None, M, K, **dropout, ROWS=rows, BLOCK=block, STAGES=1
        )
    return sums


def dropped(x: Tensor, dropout: dict[str, Any]) -> Tensor:
    """Returns a contiguous x (..., K) times its dropout factors; x itself without dropout."""
    if dropout["seed"] is None:
        return x
    y = torch.empty_like(x)
    _dropout(x, y, False, dropout)
    return y


def dropped_and_sums(x: Tensor, dropout: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns `dropped(x, dropout)` and parts (P, K) of its sum over the rows, in one pass."""
    y = None if dropout["seed"] is None else torch.empty_like(x)
    sums = _dropout(x, y, True, dropout)
    return (x if y is None else y), sums


def column_sums(x: Tensor) -> Tensor:
    """Returns parts (P, K) of the sum of a contiguous x (..., K) over its rows."""
    return _dropout(x, None, True, NO_DROPOUT)
