"""Token plus position embedding; the backward sums the gradient rows of each token.

Letters: B batch, T time, M = B T, C n_embd, V vocab_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import absent, block_of, dropout_args, wants
from gptfast.ops.triton.rows import dropped
from gptfast.ops.triton.tiles import dropout_factors

ROWS, COLUMNS = 16, 128


@triton.jit(do_not_specialize=["M", "T", "substream", "threshold"])
def embedding_kernel(
    idx, wte, wpe, y, M, T, C, seed, substream, threshold, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y_m = dropout(wte[idx_m] + wpe[m mod T])."""
    m0, c0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    m, c = m0 + tl.arange(0, ROWS), c0 + tl.arange(0, COLUMNS)
    inside = (m < M)[:, None] & (c < C)[None, :]
    token = tl.load(idx + m, mask=m < M, other=0)[:, None]
    position = (m % T).to(tl.int64)[:, None]
    value = tl.load(wte + token * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    value += tl.load(wpe + position * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        value *= dropout_factors(
            tl.load(seed), substream, 0, m0, c0, threshold, keep_scale, ROWS, COLUMNS
        )
    at = y + m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gather_sum_kernel(x, order, starts, out, C, skipped, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out_v = sum of rows order[starts[v]] .. order[starts[v + 1] - 1] of x, in that order.

    Row `skipped` of the result is 0.
    """
    v = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts + v)
    last = tl.where(v == skipped, first, tl.load(starts + v + 1))
    total = tl.zeros([COLUMNS], tl.float32)
    for p0 in tl.range(first, last, ROWS):
        p = p0 + tl.arange(0, ROWS)
        row = tl.load(order + p, mask=p < last, other=0)[:, None]
        inside = (p < last)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(x + row * C + c[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out + v.to(tl.int64) * C + c, total.to(out.dtype.element_ty), mask=c < C)


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dropout_p: float, seed: Tensor | None, stream: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """gptfast::embedding."""
    idx, (V, C), (_, T) = idx.contiguous(), wte.shape, idx.shape
    if not idx.numel():
        return wte.new_empty(*idx.shape, C, dtype=dtype)
    torch._assert_async(((idx >= 0) & (idx < V)).all(), f"embedding: idx must be in [0, {V})")
    y = wte.new_empty(*idx.shape, C, dtype=dtype)
    embedding_kernel[(triton.cdiv(idx.numel(), ROWS), triton.cdiv(C, COLUMNS))](
        idx, wte, wpe, y, idx.numel(), T, C,
        **dropout_args(dropout_p, seed, stream, wte.device), ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


def embedding_backward(
    dy: Tensor, idx: Tensor, wte: Tensor, wpe: Tensor, padding_idx: int, dropout_p: float,
    seed: Tensor | None, stream: int, wanted: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """gptfast::embedding_backward."""
    d = dropped(dy.contiguous(), dropout_args(dropout_p, seed, stream, dy.device))
    B, T = idx.shape
    dwte = dwpe = absent(wte)
    if wants(wanted, 0):
        tokens, by_token = idx.flatten().sort(stable=True)
        starts = torch.searchsorted(tokens, torch.arange(wte.shape[0] + 1, device=idx.device))
        dwte = _gather_sum(d, by_token, starts, wte, padding_idx)
    if wants(wanted, 1):
        by_position = torch.arange(B * T, device=idx.device).view(B, T).t().contiguous()
        starts = torch.arange(wpe.shape[0] + 1, device=idx.device).clamp(max=T) * B
        dwpe = _gather_sum(d, by_position, starts, wpe, -1)
    return dwte, dwpe


def _gather_sum(x: Tensor, order: Tensor, starts: Tensor, like: Tensor, skipped: int) -> Tensor:
    out, C = torch.empty_like(like), like.shape[1]
    columns = min(COLUMNS, block_of(C))
    gather_sum_kernel[(like.shape[0], triton.cdiv(C, columns))](
        x, order, starts, out, C, skipped, ROWS=ROWS, COLUMNS=columns
    )
    return out
