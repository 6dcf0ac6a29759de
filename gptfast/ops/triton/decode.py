"""The cache of keys and values: attention of one new token per slot (split-KV decoding), filling.

Programs take parts of a fixed number of keys in parallel, and a second kernel joins the parts in
their order: a sequence has the same bits whatever the other sequences' lengths are. A cache of one
part needs no second kernel, which would not change a bit.

Letters: S slots of the cache, n of them in a call, T time, C n_embd, H heads, D head_dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import block_of, cdiv, kernel
from gptfast.ops.triton.overlap import let_successor_start, overlap, wait_for_predecessor

PART = 256  # keys of a part
TILE = 4096  # elements of a tile of keys, of which a thread has 128 bytes


@kernel
@triton.jit
def part_kernel(
    q, cache, lengths, outs, tops, totals, H, capacity, parts, q_stride, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr,
    ALONE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A part's unnormalised output, maximum and sum of exponentials; nothing past the length.

    If there is one part ALONE, its normalised output.
    """
    index = tl.program_id(0).to(tl.int64)
    part, head = index % parts, index // parts
    slot, h = head // H, head % H
    let_successor_start(OVERLAP, "at start")
    wait_for_predecessor(OVERLAP)
    length = tl.minimum(tl.load(lengths + slot), capacity)
    first = part * PART
    last = tl.minimum(first + PART, length)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(q + slot * q_stride + h * D + d, mask=d < D, other=0.0).to(tl.float32)
    keys = cache + (2 * slot * H + h) * capacity * D
    values = keys + H * capacity * D
    acc = tl.zeros([BLOCK_D], tl.float32)
    top, total = -float("inf"), 0.0
    for j0 in tl.range(first, last, KEYS):
        j = j0 + tl.arange(0, KEYS)
        at = j[:, None] * D + d[None, :]
        inside = (j < last)[:, None] & (d < D)[None, :]
        k = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)  # now: it takes as long
        s = tl.where(j < last, tl.sum(k * query[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2((s - finite) * scale_log2)
        shrink = tl.exp2((top - finite) * scale_log2)
        acc = acc * shrink + tl.sum(v * p[:, None], 0)
        total = total * shrink + tl.sum(p, 0)
        top = higher
    let_successor_start(OVERLAP, "at end")
    if ALONE:
        tl.store(outs + index * D + d, (acc / total).to(outs.dtype.element_ty), mask=d < D)
    elif first < length:
        tl.store(outs + index * D + d, acc, mask=d < D)
        tl.store(tops + index, top)
        tl.store(totals + index, total)


@kernel
@triton.jit
def join_kernel(
    outs, tops, totals, lengths, out, H, capacity, parts, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = sum_p w_p out_p / sum_p w_p total_p, p in order, with w_p = 2^(c (top_p - top))."""
    head = tl.program_id(0).to(tl.int64)
    let_successor_start(OVERLAP, "at start")
    wait_for_predecessor(OVERLAP)
    length = tl.minimum(tl.load(lengths + head // H), capacity)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top, total = -float("inf"), 0.0
    for part in tl.range(0, tl.cdiv(length, PART)):
        index = head * parts + part
        own = tl.load(tops + index)
        higher = tl.maximum(top, own)
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        shrink, grow = tl.exp2((top - finite) * scale_log2), tl.exp2((own - finite) * scale_log2)
        acc = acc * shrink + tl.load(outs + index * D + d, mask=d < D, other=0.0) * grow
        total = total * shrink + tl.load(totals + index) * grow
        top = higher
    let_successor_start(OVERLAP, "at end")
    tl.store(out + head * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)


def decode_attention(
    q: Tensor, cache: Tensor, lengths: Tensor, out: Tensor | None = None, longest: int = PART
) -> Tensor:
    """softmax(q k' / sqrt(D)) v over each slot's own keys and values.

    Args:
        q: (S, H D), float32, float16 or bfloat16, any stride between slots.
        cache: (S, 2, H, capacity, D) in q's dtype, contiguous: keys, then values, the new token's
            included.
        lengths: (S,) int64, at least 1; lengths above `capacity` count as `capacity`.
        out: Receives the result, if given.
        longest: The model's longest window. The bits depend on it, but not on the capacity, which
            differs from call to call.

    Returns:
        (S, H D) in q's dtype, contiguous.
    """
    S, _, H, capacity, D = cache.shape
    parts = cdiv(capacity, PART)
    out = q.new_empty(S, H * D) if out is None else out
    outs, tops, totals = out, out, out
    if parts > 1:
        outs = q.new_empty(S, H, parts, D, dtype=torch.float32)
        tops, totals = (q.new_empty(S, H, parts, dtype=torch.float32) for _ in range(2))
    keys = min(PART, TILE // block_of(D), block_of(longest))
    scale_log2 = 1 / math.sqrt(D) / math.log(2)
    part_kernel[(S * H * parts,)](
        q, cache, lengths, outs, tops, totals, H, capacity, parts, q.stride(0), scale_log2,
        D=D, BLOCK_D=block_of(D), PART=PART, KEYS=keys, ALONE=parts == 1,
        **overlap(S), num_warps=q.element_size(),  # a thread has 128 bytes of a tile
    )  # fmt: skip
    if parts > 1:
        join_kernel[(S * H,)](
            outs, tops, totals, lengths, out, H, capacity, parts, scale_log2,
            D=D, BLOCK_D=block_of(D), PART=PART, **overlap(S),
        )  # fmt: skip
    return out


@kernel
@triton.jit(do_not_specialize=["T"])
def window_kernel(
    slots, lengths, offsets, drawn, limits, text, windows, T, capacity, block_size, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first T tokens of a slot's window, after a window that is too long has moved on."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + n)
    there = slot >= 0
    slot = tl.maximum(slot, 0)
    offset, length = tl.load(offsets + slot), tl.load(lengths + slot)
    over = length - block_size
    if stride > 0:
        moves = there & (over > 0) & (tl.load(drawn + slot) < tl.load(limits + slot))
        by = tl.where(moves, (over + stride - 1) // stride * stride, 0)
        offset += by
        tl.store(offsets + slot, offset, mask=moves)
        tl.store(lengths + slot, length - by, mask=moves)
    for t0 in tl.range(0, T, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        token = tl.load(text + slot * capacity + (offset + t) % capacity, mask=t < T, other=0)
        tl.store(windows + n * T + t, tl.where(there, token, 0), mask=t < T)


def next_windows(
    slots: Tensor, lengths: Tensor, offsets: Tensor, drawn: Tensor, limits: Tensor, text: Tensor,
    T: int, block_size: int, stride: int,
) -> Tensor:  # fmt: skip
    """Returns the first T tokens of windows; what follows a window's own tokens is arbitrary.

    Args:
        slots: (n,) int64; -1 stands for none, whose tokens are 0.
        lengths: (S,) int64, of the windows; those that move get shorter.
        offsets: (S,) int64, where the windows start; those that move start later.
        drawn: (S,) int64, tokens drawn; a slot that has drawn its limit does not move.
        limits: (S,) int64.
        text: (S, capacity) int64; token i of a text is at i % capacity.
        T: At most capacity.
        block_size: The longest window.
        stride: A window that is too long moves by a multiple of this; 0: none moves.

    Returns:
        (n, T) int64.
    """
    windows = slots.new_empty(len(slots), T)
    window_kernel[(len(slots),)](
        slots, lengths, offsets, drawn, limits, text, windows, T, text.shape[1], block_size, stride,
        BLOCK=256,
    )  # fmt: skip
    return windows


@kernel
@triton.jit(do_not_specialize=["T"])
def fill_kernel(
    kv, slots, lengths, cache, T, capacity, row_stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes keys and values of a window's position to the cache, unless it is the last one."""
    C: tl.constexpr = H * D
    n, t = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    slot = tl.load(slots + n)
    if slot >= 0:
        if t + 1 < tl.load(lengths + slot):
            column = tl.arange(0, BLOCK)
            head = slot * 2 * H + column // D
            row = tl.load(kv + (n * T + t) * row_stride + column, mask=column < 2 * C)
            at = (head * capacity + t) * D + column % D
            tl.store(cache + at, row, mask=column < 2 * C)


def fill_cache(kv: Tensor, slots: Tensor, lengths: Tensor, cache: Tensor) -> None:
    """Writes keys and values of windows to the cache, except for each window's last token.

    Args:
        kv: (n, T, 2 C): keys, then values; the rows are equally far apart, by any stride.
        slots: (n,) int64; -1 stands for none.
        lengths: (S,) int64, of the windows.
        cache: (S, 2, H, capacity, D), contiguous, with capacity >= T.
    """
    n, T, columns = kv.shape
    _, _, H, capacity, D = cache.shape
    fill_kernel[(n * T,)](
        kv, slots, lengths, cache, T, capacity, kv.stride(1), H=H, D=D, BLOCK=block_of(columns)
    )
