"""Token plus position embedding; the backward sums the gradient rows of each token.

Letters: B batch, T time, M = B T, C n_embd, V vocab_size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import (
    ASSERTING,
    absent,
    block_of,
    cdiv,
    dropout_args,
    kernel,
    precision,
    programs,
    wants,
)
from gptfast.ops.triton.rows import dropped
from gptfast.ops.triton.tiles import dropout_factors

ROWS, COLUMNS = 16, 128
# Up to this number of tokens and positions together, gradients are a product with one-hot rows.
ONE_HOT = 1024
TILE = 64  # tokens and columns of a tile of that product, which has half as many rows
ORDER_TOKENS = 128  # tokens whose rows one program of `order_kernel` finds
ORDER_BLOCK = 2048  # indices that it reads at a time
# A whole row where it can be, because most tokens of a large vocabulary have none to add up.
GATHERED_ROWS, GATHERED_COLUMNS = 8, 1024


@kernel
@triton.jit(do_not_specialize=["M", "T", "substream", "threshold"])
def embedding_kernel(
    idx, wte, wpe, y, M, T, C, V, seed, substream, threshold, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y_m = dropout(wte[idx_m] + wpe[m mod T])."""
    m0, c0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    m, c = m0 + tl.arange(0, ROWS), c0 + tl.arange(0, COLUMNS)
    token = tl.load(idx + m, mask=m < M, other=0)
    known = (token >= 0) & (token < V)
    tl.device_assert(known, "embedding: idx must be in [0, vocab_size)")
    inside = (m < M)[:, None] & (c < C)[None, :]
    position = (m % T).to(tl.int64)[:, None]
    # Nothing is read at an index out of range, whatever the assertion does.
    value = tl.load(
        wte + token[:, None] * C + c[None, :], mask=inside & known[:, None], other=0.0
    ).to(tl.float32)
    value += tl.load(wpe + position * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        value *= dropout_factors(
            tl.load(seed), substream, 0, m0, c0, threshold, keep_scale, ROWS, COLUMNS
        )
    at = y + m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@kernel
@triton.jit(do_not_specialize=["M", "T", "rows", "substream", "threshold"])
def one_hot_kernel(
    dy, idx, parts, M, T, C, V, rows, seed, substream, threshold, keep_scale,
    PRECISION: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sums of the rows of dropout(dY) of each token n < V, and of each position n - V.

    Multiplies a one-hot matrix by dY, for each part of `rows` rows. `rows` is a multiple of BM. A
    value that is not finite reaches all rows, because 0 times it is NaN.
    """
    n0, c0, part = tl.program_id(0) * BN, tl.program_id(1) * BC, tl.program_id(2)
    n, c = n0 + tl.arange(0, BN), c0 + tl.arange(0, BC)
    acc = tl.zeros([BN, BC], tl.float32)
    first = part * rows
    for m0 in tl.range(first, tl.minimum(first + rows, M), BM):
        m = m0 + tl.arange(0, BM)
        token = tl.load(idx + m, mask=m < M, other=-1).to(tl.int32)
        hot = (n[:, None] == token[None, :]) | (n[:, None] == (V + m % T)[None, :])
        d = tl.load(
            dy + m.to(tl.int64)[:, None] * C + c[None, :],
            mask=(m < M)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        if seed is not None:
            factors = dropout_factors(
                tl.load(seed), substream, 0, m0, c0, threshold, keep_scale, BM, BC
            )
            d = (d.to(tl.float32) * factors).to(d.dtype)
        acc = tl.dot(hot.to(d.dtype), d, acc, input_precision=PRECISION)
    at = (tl.cast(part, tl.int64) * (V + T) + n)[:, None] * C + c[None, :]
    tl.store(parts + at, acc, mask=(n < V + T)[:, None] & (c < C)[None, :])


@kernel
@triton.jit(do_not_specialize=["P", "T", "padding"])
def tables_kernel(
    parts, dwte, dwpe, P, T, C, V, padding, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Adds up the P parts of a row of dwte or dwpe, ROWS at a time; dwpe's rows from T on are 0."""
    n = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for p0 in tl.range(0, tl.where((n < V + T) & (n != padding), P, 0), ROWS):
        p = p0 + tl.arange(0, ROWS)
        row = (p.to(tl.int64) * (V + T) + n)[:, None]
        inside = (p < P)[:, None] & (c < C)[None, :]
        total += tl.load(parts + row * C + c[None, :], mask=inside, other=0.0)
    value = tl.sum(total, 0)
    if dwte is not None:
        at = tl.where(n < V, n, 0).to(tl.int64) * C + c
        tl.store(dwte + at, value.to(dwte.dtype.element_ty), mask=c < tl.where(n < V, C, 0))
    if dwpe is not None:
        at = tl.where(n < V, 0, n - V).to(tl.int64) * C + c
        tl.store(dwpe + at, value.to(dwpe.dtype.element_ty), mask=c < tl.where(n < V, 0, C))


@kernel
@triton.jit
def order_kernel(
    idx, unordered, order, starts, M, V,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows m in the order of (idx_m, m), and in starts[v] the place of the first row of token v.

    Every program does it for TOKENS tokens: its place is the number of smaller indices. It lists
    its rows in their order (`unordered`), counts those of each of its tokens, and places each row
    behind the smaller tokens and behind the earlier rows of its own: a stable counting sort.
    """
    v0 = tl.program_id(0) * TOKENS
    v = tl.arange(0, TOKENS)
    smaller = tl.zeros([BLOCK], tl.int32)
    for m0 in tl.range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        smaller += (tl.load(idx + m, mask=m < M, other=V) < v0).to(tl.int32)
    first = tl.sum(smaller, 0)
    last = first
    for m0 in tl.range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        token = tl.load(idx + m, mask=m < M, other=-1)
        own = ((token >= v0) & (token < v0 + TOKENS)).to(tl.int32)
        tl.store(unordered + last + tl.cumsum(own, 0) - 1, m, mask=own != 0)
        last += tl.sum(own, 0)
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    counts = tl.zeros([TOKENS], tl.int32)
    for p0 in tl.range(first, last, TILE):
        p = p0 + tl.arange(0, TILE)
        m = tl.load(unordered + p, mask=p < last, other=0)
        token = tl.load(idx + m, mask=p < last, other=-1) - v0
        counts += tl.sum((token[:, None] == v[None, :]).to(tl.int32), 0)
    place = first + tl.cumsum(counts, 0) - counts
    tl.store(starts + v0 + v, place, mask=v0 + v < V)
    tl.store(starts + V, last, mask=v0 + TOKENS >= V)
    for p0 in tl.range(first, last, TILE):
        p = p0 + tl.arange(0, TILE)
        m = tl.load(unordered + p, mask=p < last, other=0)
        token = tl.load(idx + m, mask=p < last, other=-1) - v0
        own = (token[:, None] == v[None, :]).to(tl.int32)
        at = tl.sum(own * (place[None, :] + tl.cumsum(own, 0) - 1), 1)
        tl.store(order + at, m, mask=p < last)
        place += tl.sum(own, 0)


@kernel
@triton.jit(do_not_specialize=["padding"])
def token_grad_kernel(
    d, order, starts, dwte, C, padding, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dwte_v = sum of rows order[starts[v]] .. order[starts[v + 1] - 1] of D, in this order.

    Row `padding` of the result is 0.
    """
    v = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts + v)
    last = tl.where(v == padding, first, tl.load(starts + v + 1))
    total = tl.zeros([COLUMNS], tl.float32)
    for p0 in tl.range(first, last, ROWS):
        p = p0 + tl.arange(0, ROWS)
        row = tl.load(order + p, mask=p < last, other=0).to(tl.int64)[:, None]
        inside = (p < last)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(d + row * C + c[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(dwte + v.to(tl.int64) * C + c, total.to(dwte.dtype.element_ty), mask=c < C)


@kernel
@triton.jit(do_not_specialize=["B", "T"])
def position_grad_kernel(d, dwpe, B, T, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dwpe_t = sum of rows t of each of the B sequences of D, in their order; 0 from T on."""
    t = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for b0 in tl.range(0, tl.where(t < T, B, 0), ROWS):
        b = b0 + tl.arange(0, ROWS)
        row = (b.to(tl.int64) * T + t)[:, None]
        inside = (b < B)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(d + row * C + c[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(dwpe + t.to(tl.int64) * C + c, total.to(dwpe.dtype.element_ty), mask=c < C)


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dropout_p: float, seed: Tensor | None, stream: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """gptfast::embedding."""
    idx, (V, C), (_, T) = idx.contiguous(), wte.shape, idx.shape
    y = wte.new_empty(*idx.shape, C, dtype=dtype)
    if y.numel():
        embedding_kernel[(cdiv(idx.numel(), ROWS), cdiv(C, COLUMNS))](
            idx, wte, wpe, y, idx.numel(), T, C, V,
            **dropout_args(dropout_p, seed, stream, wte.device), ROWS=ROWS, COLUMNS=COLUMNS,
            **ASSERTING,
        )  # fmt: skip
    return y


def embedding_backward(
    dy: Tensor, idx: Tensor, wte: Tensor, wpe: Tensor, padding_idx: int, dropout_p: float,
    seed: Tensor | None, stream: int, wanted: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """gptfast::embedding_backward."""
    dy, idx = dy.contiguous(), idx.contiguous()
    dropout = dropout_args(dropout_p, seed, stream, dy.device)
    dwte = torch.empty_like(wte) if wants(wanted, 0) else None
    dwpe = torch.empty_like(wpe) if wants(wanted, 1) else None
    if wte.shape[0] + idx.shape[1] <= ONE_HOT:
        _grads_by_product(dy, idx, dwte, dwpe, wte.shape[0], wpe.shape[0], padding_idx, dropout)
    else:
        d = dropped(dy, dropout)
        if dwte is not None:
            _token_grads(d, idx, dwte, padding_idx)
        if dwpe is not None:
            _position_grads(d, idx, dwpe)
    return absent(wte) if dwte is None else dwte, absent(wte) if dwpe is None else dwpe


def _grads_by_product(
    dy: Tensor, idx: Tensor, dwte: Tensor | None, dwpe: Tensor | None, V: int, block_size: int,
    padding_idx: int, dropout: dict[str, Any],
) -> None:  # fmt: skip
    M, T, C = idx.numel(), idx.shape[1], dy.shape[-1]
    across, down = cdiv(C, TILE), cdiv(V + T, TILE)
    parts = max(1, min(programs(dy.device) // (across * down), cdiv(M, TILE // 2)))
    rows = cdiv(cdiv(M, parts), TILE // 2) * (TILE // 2)
    sums = dy.new_empty(parts, V + T, C, dtype=torch.float32)
    # These products add: their operands are exact in two of tf32's numbers.
    exact = "ieee" if precision() == "ieee" else "tf32x3"
    one_hot_kernel[(down, across, parts)](
        dy, idx, sums, M, T, C, V, rows, **dropout,
        PRECISION=exact, BN=TILE, BC=TILE, BM=TILE // 2,
    )  # fmt: skip
    columns = min(256, block_of(C))
    tables_kernel[(V + block_size, cdiv(C, columns))](
        sums, dwte, dwpe, parts, T, C, V, padding_idx, ROWS=16, COLUMNS=columns,
        num_warps=2,
    )  # fmt: skip


def _token_grads(d: Tensor, idx: Tensor, dwte: Tensor, padding_idx: int) -> None:
    M, (V, C) = idx.numel(), dwte.shape
    unordered, order = (idx.new_empty(M, dtype=torch.int32) for _ in range(2))
    starts = idx.new_empty(V + 1, dtype=torch.int32)
    order_kernel[(cdiv(V, ORDER_TOKENS),)](
        idx, unordered, order, starts, M, V,
        TOKENS=ORDER_TOKENS, BLOCK=ORDER_BLOCK, TILE=TILE, num_warps=8,
    )  # fmt: skip
    columns = min(GATHERED_COLUMNS, block_of(C))
    token_grad_kernel[(V, cdiv(C, columns))](
        d, order, starts, dwte, C, padding_idx, ROWS=GATHERED_ROWS, COLUMNS=columns
    )


def _position_grads(d: Tensor, idx: Tensor, dwpe: Tensor) -> None:
    (B, T), (block_size, C) = idx.shape, dwpe.shape
    columns, rows = min(COLUMNS, block_of(C)), min(64, block_of(B, 1))
    position_grad_kernel[(block_size, cdiv(C, columns))](
        d, dwpe, B, T, C, ROWS=rows, COLUMNS=columns, num_warps=2
    )
