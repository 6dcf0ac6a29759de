"""Attention of one new token per sequence to its cached keys and values (split-KV decoding).

Programs take parts of a fixed number of keys in parallel, and a second kernel joins the parts in
their order: a sequence has the same bits whatever the other sequences' lengths are.

Letters: S slots of the cache, H heads, D head_dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import block_of

PART, KEYS = 256, 64  # keys of a part, and of one iteration of its loop


@triton.jit
def part_kernel(
    q, cache, lengths, outs, tops, totals, H, capacity, parts, q_stride, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A part's unnormalised output, maximum and sum of exponentials; nothing past the length."""
    index = tl.program_id(0).to(tl.int64)
    part, head = index % parts, index // parts
    slot, h = head // H, head % H
    length = tl.load(lengths + slot)
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
        s = tl.where(j < last, tl.sum(k * query[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2((s - finite) * scale_log2)
        shrink = tl.exp2((top - finite) * scale_log2)
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        acc = acc * shrink + tl.sum(v * p[:, None], 0)
        total = total * shrink + tl.sum(p, 0)
        top = higher
    if first < length:
        tl.store(outs + index * D + d, acc, mask=d < D)
        tl.store(tops + index, top)
        tl.store(totals + index, total)


@triton.jit
def join_kernel(
    outs, tops, totals, lengths, out, H, parts, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out = sum_p w_p out_p / sum_p w_p total_p, p in order, with w_p = 2^(c (top_p - top))."""
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + head // H)
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
    tl.store(out + head * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)


def decode_attention(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v over each sequence's own keys and values.

    Args:
        q: (S, H D), float32, float16 or bfloat16, any stride between slots.
        cache: (S, 2, H, capacity, D) in q's dtype, contiguous: keys, then values; those of the new
            token included.
        lengths: (S,) int64, from 1 to capacity.

    Returns:
        (S, H D) in q's dtype.
    """
    S, _, H, capacity, D = cache.shape
    parts = triton.cdiv(capacity, PART)
    outs = q.new_empty(S, H, parts, D, dtype=torch.float32)
    tops, totals = (q.new_empty(S, H, parts, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(S, H * D)
    scale_log2 = 1 / math.sqrt(D) / math.log(2)
    part_kernel[(S * H * parts,)](
        q, cache, lengths, outs, tops, totals, H, capacity, parts, q.stride(0), scale_log2,
        D=D, BLOCK_D=block_of(D), PART=PART, KEYS=KEYS,
    )  # fmt: skip
    join_kernel[(S * H,)](
        outs, tops, totals, lengths, out, H, parts, scale_log2, D=D, BLOCK_D=block_of(D), PART=PART
    )
    return out
