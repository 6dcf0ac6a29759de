"""The backward of attention: a kernel for dQ, one for dK and dV.

Every program writes its own part of a gradient, so there are no atomics and the bits repeat.

Letters: B batch, T time (Tq queries, Tk keys), H heads, D head_dim.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.attention import (
    head_kind,
    head_rows,
    head_shared,
    held_rows,
    parts_of,
    row_products,
)
from gptfast.ops.triton.launch import config, dropout_args, precision, tuned
from gptfast.ops.triton.tiles import dropout_factors, own_head


@triton.jit
def _delta(out, out_row, dout, dout_row, i, Tq, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """delta_i = sum_d dO_id O_id, which is sum_j P_ij dP_ij."""
    o = head_rows(out, i, out_row, Tq, d, D, BLOCK_D, True).to(tl.float32)
    do = head_rows(dout, i, dout_row, Tq, d, D, BLOCK_D, True).to(tl.float32)
    return tl.sum(o * do, 1)


@triton.jit
def _score_grad(
    s, dp, top, log_sum, delta, i, i0, j, j0, Tk, offset, scale_log2, head,
    seed, substream, threshold, keep_scale,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of dropped weights P F and of the scores' gradient dS, from s = q k' and dp = dO v'.

    P = 2^(c (s - top) - log_sum),  dP = dp F,  dS = P (dP - delta), 0 of keys that are not seen.
    """
    p = tl.exp2((s - top[:, None]) * scale_log2 - log_sum[:, None])
    if MASKED:
        seen = (j[None, :] <= i[:, None] + offset) & (j < Tk)[None, :]
        p = tl.where(seen, p, 0.0)
    dropped = p
    if seed is not None:
        factors = dropout_factors(
            tl.load(seed), substream, head, i0, j0, threshold, keep_scale, BM, BN
        )
        dp *= factors
        dropped = p * factors
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    return dropped, ds


@triton.jit
def _softmax_sums(lse, i, Tq):
    """The maximum of rows i of a head, and log2 of their sums; those past Tq are 0."""
    top = tl.load(lse + i, mask=i < Tq, other=0.0)
    return top, tl.log2(tl.load(lse + Tq + i, mask=i < Tq, other=1.0))


@triton.jit
def _query_grad(
    dq, q, do, top, log_sum, delta, k, v, q_row, do_row, k_row, v_row, i, i0, first, last, Tq, Tk,
    offset, scale_log2, head, seed, substream, threshold, keep_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ += dS K over the keys [first, last)."""
    d = tl.arange(0, BLOCK_D)
    for j0 in tl.range(first, last, BN):
        j = j0 + tl.arange(0, BN)
        keys = head_rows(k, j, k_row, Tk, d, D, BLOCK_D, MASKED)
        values = held_rows(v, j, v_row, Tk, d, D, BLOCK_D, PART, MASKED)
        shown = keys if PART == BLOCK_D else k
        s = row_products(q, i, q_row, Tq, shown, j, k_row, Tk, PRECISION, D, BLOCK_D, PART)
        dp = row_products(do, i, do_row, Tq, values, j, v_row, Tk, PRECISION, D, BLOCK_D, PART)
        _, ds = _score_grad(
            s, dp, top, log_sum, delta, i, i0, j, j0, Tk, offset, scale_log2, head,
            seed, substream, threshold, keep_scale, MASKED, BM, BN,
        )  # fmt: skip
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


QUERY_GRAD = {
    (2, 64): [config(4, 2, BM=64, BN=32), config(4, 1, BM=32, BN=32)],
    (2, 128): [config(4, 2, BM=64, BN=32), config(4, 1, BM=32, BN=32)],
    (2, 256): [config(4, 1, BM=32, BN=32)],
    (4, 64): [config(8, 1, BM=32, BN=16), config(4, 1, BM=16, BN=16)],
    (4, 128): [config(4, 1, BM=16, BN=16)],
    (4, 256): [config(4, 1, BM=16, BN=16)],
}


@tuned(
    QUERY_GRAD,
    head_kind,
    lambda args: head_shared(2 * args["BM"], 2 * args["BN"], args),
    ["D", "PRECISION"],
)
@triton.jit(do_not_specialize=["substream", "threshold", "Tq", "Tk"])
def query_grad_kernel(
    q, k, v, out, dout, dq, lse, delta, H, Tq, Tk, scale, scale_log2,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, out_b, out_h, out_row,
    dout_b, dout_h, dout_row, dq_b, dq_h, dq_row,
    seed, substream, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ of a block of BM queries of one head, and their delta for the other kernel."""
    head, b, h, i0 = own_head(H, Tq, BM, True)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    dout += b * dout_b + h * dout_h
    dq += b * dq_b + h * dq_h
    i, d = i0 + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    offset = Tk - Tq
    queries = held_rows(q, i, q_row, Tq, d, D, BLOCK_D, PART, True)
    do = held_rows(dout, i, dout_row, Tq, d, D, BLOCK_D, PART, True)
    row_delta = _delta(out, out_row, dout, dout_row, i, Tq, d, D, BLOCK_D)
    tl.store(delta + head.to(tl.int64) * Tq + i, row_delta, mask=i < Tq)
    top, log_sum = _softmax_sums(lse + head.to(tl.int64) * 2 * Tq, i, Tq)
    whole = tl.maximum(i0 + 1 + offset, 0) // BN * BN
    last = tl.minimum(Tk, i0 + BM + offset)
    total = tl.zeros([BM, BLOCK_D], tl.float32)
    total = _query_grad(
        total, queries, do, top, log_sum, row_delta, k, v, q_row, dout_row, k_row, v_row, i, i0,
        0, whole, Tq, Tk, offset, scale_log2, head, seed, substream, threshold, keep_scale,
        False, PRECISION, D, BLOCK_D, PART, BM, BN,
    )  # fmt: skip
    total = _query_grad(
        total, queries, do, top, log_sum, row_delta, k, v, q_row, dout_row, k_row, v_row, i, i0,
        whole, last, Tq, Tk, offset, scale_log2, head, seed, substream, threshold, keep_scale,
        True, PRECISION, D, BLOCK_D, PART, BM, BN,
    )  # fmt: skip
    at = dq + i.to(tl.int64)[:, None] * dq_row + d[None, :]
    inside = (i < Tq)[:, None] & (d < D)[None, :]
    tl.store(at, (total * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _key_grads(
    dk, dv, q, dout, lse, delta, keys, values, q_row, dout_row, k_row, v_row, j, j0, d, first,
    last, Tq, Tk, offset, scale_log2, head, seed, substream, threshold, keep_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dV += (P F)' dO and dK += dS' Q over the queries [first, last); those past Tq are 0."""
    for i0 in tl.range(first, last, BM):
        i = i0 + tl.arange(0, BM)
        queries = head_rows(q, i, q_row, Tq, d, D, COLUMNS, True)
        do = head_rows(dout, i, dout_row, Tq, d, D, COLUMNS, True)
        top, log_sum = _softmax_sums(lse, i, Tq)
        row_delta = tl.load(delta + i, mask=i < Tq, other=0.0)
        shown = queries if PART == BLOCK_D else q
        s = row_products(shown, i, q_row, Tq, keys, j, k_row, Tk, PRECISION, D, BLOCK_D, PART)
        shown = do if PART == BLOCK_D else dout
        dp = row_products(shown, i, dout_row, Tq, values, j, v_row, Tk, PRECISION, D, BLOCK_D, PART)
        dropped, ds = _score_grad(
            s, dp, top, log_sum, row_delta, i, i0, j, j0, Tk, offset, scale_log2, head,
            seed, substream, threshold, keep_scale, MASKED, BM, BN,
        )  # fmt: skip
        dv = tl.dot(tl.trans(dropped.to(do.dtype)), do, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds.to(queries.dtype)), queries, dk, input_precision=PRECISION)
    return dk, dv


KEY_GRADS = {
    (2, 64): [config(8, 2, BM=64, BN=32), config(4, 2, BM=64, BN=32)],
    (2, 128): [config(4, 1, BM=32, BN=32)],
    (2, 256): [config(4, 1, BM=16, BN=32)],
    (4, 64): [config(8, 1, BM=32, BN=16)],
    (4, 128): [config(4, 1, BM=16, BN=16)],
    (4, 256): [config(8, 1, BM=16, BN=16)],
}


@tuned(
    KEY_GRADS,
    head_kind,
    lambda args: head_shared(2 * args["BN"], 2 * args["BM"], args),
    ["D", "PRECISION"],
)
@triton.jit(do_not_specialize=["substream", "threshold", "Tq", "Tk"])
def key_grads_kernel(
    q, k, v, dout, dk, dv, lse, delta, H, Tq, Tk, scale, scale_log2,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, dout_b, dout_h, dout_row,
    dk_b, dk_h, dk_row, dv_b, dv_h, dv_row,
    seed, substream, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of BN keys of one head; the keys that most queries see come first.

    A program makes COLUMNS of their columns.
    """
    head, b, h, j0 = own_head(H, Tk, BN, False)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    dout += b * dout_b + h * dout_h
    dk += b * dk_b + h * dk_h
    dv += b * dv_b + h * dv_h
    lse += head.to(tl.int64) * 2 * Tq
    delta += head.to(tl.int64) * Tq
    j, d = j0 + tl.arange(0, BN), tl.arange(0, COLUMNS)
    if COLUMNS < BLOCK_D:
        d += tl.program_id(1) * COLUMNS
    offset = Tk - Tq
    keys = held_rows(k, j, k_row, Tk, d, D, BLOCK_D, PART, True)
    values = held_rows(v, j, v_row, Tk, d, D, BLOCK_D, PART, True)
    # No query before `first` sees a key of the block, all those from `whole` on see every one.
    first = tl.maximum(j0 - offset, 0) // BM * BM
    whole = tl.cdiv(tl.maximum(tl.minimum(j0 + BN, Tk) - 1 - offset, 0), BM) * BM
    whole = tl.minimum(tl.maximum(whole, first), tl.cdiv(Tq, BM) * BM)
    key_total = tl.zeros([BN, COLUMNS], tl.float32)
    value_total = tl.zeros([BN, COLUMNS], tl.float32)
    key_total, value_total = _key_grads(
        key_total, value_total, q, dout, lse, delta, keys, values, q_row, dout_row, k_row, v_row,
        j, j0, d, first, whole, Tq, Tk, offset, scale_log2, head, seed, substream, threshold,
        keep_scale, True, PRECISION, D, BLOCK_D, PART, COLUMNS, BM, BN,
    )  # fmt: skip
    key_total, value_total = _key_grads(
        key_total, value_total, q, dout, lse, delta, keys, values, q_row, dout_row, k_row, v_row,
        j, j0, d, whole, Tq, Tq, Tk, offset, scale_log2, head, seed, substream, threshold,
        keep_scale, False, PRECISION, D, BLOCK_D, PART, COLUMNS, BM, BN,
    )  # fmt: skip
    inside = (j < Tk)[:, None] & (d < D)[None, :]
    rows = j.to(tl.int64)[:, None]
    tl.store(
        dk + rows * dk_row + d[None, :], (key_total * scale).to(dk.dtype.element_ty), mask=inside
    )
    tl.store(dv + rows * dv_row + d[None, :], value_total.to(dv.dtype.element_ty), mask=inside)


def write_grads(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], scale: float, dropout: dict[str, Any],
) -> None:  # fmt: skip
    """Writes `grads`, dq, dk and dv; like dout and out these are (B, H, T, D) of any strides.

    scale is not negative.
    """
    dq, dk, dv = grads
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    delta = lse.new_empty(B, H, Tq)
    shape: dict[str, Any] = {**parts_of(q), "PRECISION": precision()}
    sizes = H, Tq, Tk, scale, scale / math.log(2)
    inputs = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    if dq.numel():
        queries = lambda meta: (triton.cdiv(Tq, meta["BM"]) * B * H,)  # noqa: E731
        query_grad_kernel[queries](
            q, k, v, out, dout, dq, lse, delta, *sizes, *inputs,
            *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], **dropout, **shape,
        )  # fmt: skip
    if dk.numel():
        block = columns = shape["BLOCK_D"]
        if shape["PART"] < block:  # the threads of AMD's warps want 128 for loads of 16 bytes
            columns = 64 if shape["PRECISION"] == "tf32x3" else 128
        keys = lambda meta: (triton.cdiv(Tk, meta["BN"]) * B * H, block // columns)  # noqa: E731
        key_grads_kernel[keys](
            q, k, v, dout, dk, dv, lse, delta, *sizes, *inputs,
            *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], **dropout, **shape,
            COLUMNS=columns,
        )  # fmt: skip


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    dropout_p: float, seed: Tensor | None, stream: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::attention_backward."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    write_grads(
        dout.contiguous().transpose(1, 2), q, k, v, out.transpose(1, 2), lse, grads, scale,
        dropout_args(dropout_p, seed, stream, q.device),
    )  # fmt: skip
    return grads
