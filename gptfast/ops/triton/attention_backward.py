"""The backward of attention: a kernel for dQ, one for dK and dV.

Every program writes its own part of a gradient, so there are no atomics and the bits repeat.

Letters: B batch, T time (Tq queries, Tk keys), H heads, D head_dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.attention import (
    descriptors,
    head_kind,
    head_rows,
    head_shared,
    held_rows,
    log2_scale,
    parts_of,
    row_products,
    row_tiles,
)
from gptfast.ops.triton.launch import cdiv, config, dropout_args, precision, tuned
from gptfast.ops.triton.tiles import DROPOUT_ROWS, dropped_rows, kept_of, own_head

TERM_ROWS = tl.constexpr(64)  # a multiple of the queries that key_grads_kernel reads at once
MASK_BYTES = 1 << 26  # of dropout's mask at a time, unless a single head takes more


@triton.jit
def _masks_of(masks, head, i0, j0, padded, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of `dropped_rows`, one byte each, in a head's mask, (padded / 8, columns)."""
    GROUPS: tl.constexpr = ROWS // DROPOUT_ROWS
    group = head.to(tl.int64) * (padded // DROPOUT_ROWS) + i0 // DROPOUT_ROWS
    rows = (group + tl.arange(0, GROUPS)).to(tl.int64)[:, None] * columns
    return masks + rows + (j0 + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def _row_of_sums(sums, b, h, i0, T, H, D, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """The address of head h in a block's row of `sums`, which has EACH times H D columns."""
    block = b * tl.cdiv(T, BLOCK) + i0 // BLOCK
    return sums + block * (EACH * H * D) + h * D


@triton.jit
def _terms_of(i):
    """The offset of row i's top; its log_sum and delta follow TERM_ROWS and 2 TERM_ROWS later."""
    return i + i // TERM_ROWS * (2 * TERM_ROWS)


QUERY_GRAD = {
    (2, 64, True): [config(4, 3, BM=64, BN=64)],
    (2, 64, True, "dropout"): [config(4, 3, BM=64, BN=32)],
    (2, 128, True): [config(8, 3, BM=128, BN=64)],
    (2, 256, True): [config(4, 2, BM=64, BN=16)],
    (2, 256, True, "dropout"): [config(8, 2, BM=64, BN=16)],
    (2, 64, False): [config(4, 2, BM=64, BN=32)],
    (2, 128, False): [config(4, 2, BM=64, BN=32)],
    (2, 256, False): [config(4, 1, BM=16, BN=32)],
    (4, 64, False): [config(8, 1, BM=32, BN=16)],
    (4, 128, False): [config(4, 1, BM=16, BN=16)],
    (4, 256, False): [config(8, 1, BM=16, BN=16)],
    (4, 256, False, "dropout"): [config(8, 1, BM=16, BN=32)],
}


def kind_in(table: Mapping[Any, Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Makes a `head_kind` that adds "dropout" where the table has other tiles for it.

    With dropout, the usual tiles would spill registers there.
    """

    def kind(args: Any) -> tuple[Any, ...]:
        found = head_kind(args)
        dropout = *found, "dropout"
        return dropout if args["masks"] is not None and dropout in table else found

    return kind


@tuned(
    QUERY_GRAD,
    kind_in(QUERY_GRAD),
    lambda args: head_shared(2 * args["BM"], 2 * args["BN"], args),
    ["D", "PRECISION", "TILES"],
)
@triton.jit(do_not_specialize=["first_head", "substream", "threshold", "Tq", "Tk"])
def query_grad_kernel(
    q, k, v, out, dout, dq, sums, lse, terms, masks, k_tiles, v_tiles,
    first_head, H, Tq, Tk, padded, columns, scale, scale_log2,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, out_b, out_h, out_row,
    dout_b, dout_h, dout_row, dq_b, dq_h, dq_row,
    seed, substream, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ of a block of BM queries of one head, and numbers that the kernel for dK and dV reads.

    P = 2^(c (q k' - top) - log_sum),  dP = dropout(dO v'),  delta_i = sum_d dO_id O_id, which is
    sum_j P_ij dP_ij,  dS = P (dP - delta),  dQ = scale dS K.

    `terms` has top, log_sum and delta for `padded` rows of each head, 0 from Tq on: the other
    kernel reads them without masks, by one address. `masks` has a bit for each of (padded, columns)
    from `first_head` on, which says whether dropout drops it: drawing the mask again takes longer
    than reading it. `sums`, if given, has a row for each b and i0, parts of sums over b and i, each
    (H, D):

    sum_i dQ_i,  sum_j dK_j = scale sum_i (sum_j dS_ij) Q_i = 0,

    because sum_j dS_ij = delta_i - delta_i; and, without dropout, under which sum_j P_ij = 1,
    sum_j dV_j = sum_i dO_i. These sums are free here; key_grads_kernel would need more registers
    for them.
    """
    head, b, h, i0 = own_head(H, Tq, BM, True, first_head)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    dout += b * dout_b + h * dout_h
    dq += b * dq_b + h * dq_h
    i, d = i0 + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    offset = Tk - Tq
    queries = held_rows(q, None, b, h, i0, q_row, Tq, d, D, BLOCK_D, PART, BM)
    do = held_rows(dout, None, b, h, i0, dout_row, Tq, d, D, BLOCK_D, PART, BM)
    o_tile = head_rows(out, None, b, h, i0, out_row, Tq, d, D, BLOCK_D, BM).to(tl.float32)
    do_tile = head_rows(dout, None, b, h, i0, dout_row, Tq, d, D, BLOCK_D, BM).to(tl.float32)
    row_delta = tl.sum(o_tile * do_tile, 1)
    EACH: tl.constexpr = 3 if masks is None else 2
    if sums is not None:
        if masks is None:
            row = _row_of_sums(sums, b, h, i0, Tq, H, D, EACH, BM)
            tl.store(row + 2 * H * D + d, tl.sum(do_tile, 0), mask=d < D)
    lse += head.to(tl.int64) * 2 * Tq
    top = tl.load(lse + i, mask=i < Tq, other=0.0)
    log_sum = tl.load(lse + Tq + i, mask=i < Tq, other=0.0)
    terms += head.to(tl.int64) * 3 * padded
    at = terms + _terms_of(i)
    tl.store(at, top, mask=i < padded)
    tl.store(at + TERM_ROWS, log_sum, mask=i < padded)
    tl.store(at + 2 * TERM_ROWS, row_delta, mask=i < padded)
    if BM < TERM_ROWS:  # otherwise the last program has written all rows
        if i0 + BM >= Tq:
            rest = i0 + BM + tl.arange(0, TERM_ROWS)
            end, zeros = terms + _terms_of(rest), tl.zeros([TERM_ROWS], tl.float32)
            tl.store(end, zeros, mask=rest < padded)
            tl.store(end + TERM_ROWS, zeros, mask=rest < padded)
            tl.store(end + 2 * TERM_ROWS, zeros, mask=rest < padded)
    total = tl.zeros([BM, BLOCK_D], tl.float32)
    if masks is not None:
        key = tl.load(seed)
        masks = _masks_of(masks, head - first_head, i0, 0, padded, columns, BM, BN)
        in_mask = (i0 // DROPOUT_ROWS + tl.arange(0, BM // DROPOUT_ROWS)) < padded // DROPOUT_ROWS
    # No query masks a key before `whole`; every query masks the keys from `last` on.
    whole = tl.maximum(i0 + 1 + offset, 0) // BN * BN
    last = tl.minimum(Tk, i0 + BM + offset)
    for MASKED in tl.static_range(2):
        for j0 in tl.range(whole if MASKED else 0, last if MASKED else whole, BN):
            keys = held_rows(k, k_tiles, b, h, j0, k_row, Tk, d, D, BLOCK_D, PART, BN)
            values = held_rows(v, v_tiles, b, h, j0, v_row, Tk, d, D, BLOCK_D, PART, BN)
            zeros = tl.zeros([BM, BN], tl.float32)
            s = row_products(
                queries, i0, q_row, Tq, keys, j0, k_row, Tk, zeros,
                PRECISION, D, BLOCK_D, PART, BM, BN,
            )  # fmt: skip
            dp = row_products(
                do, i0, dout_row, Tq, values, j0, v_row, Tk, zeros,
                PRECISION, D, BLOCK_D, PART, BM, BN,
            )  # fmt: skip
            p = tl.exp2((s - top[:, None]) * scale_log2 - log_sum[:, None])
            if masks is not None:
                dropped = dropped_rows(key, substream, head, i0, j0, threshold, BM, BN)
                tl.store(masks + j0, dropped.to(tl.uint8), mask=in_mask[:, None])
                dp = tl.where(kept_of(dropped, BM, BN), dp * keep_scale, 0.0)
            ds = p * (dp - row_delta[:, None])
            if MASKED:
                j = j0 + tl.arange(0, BN)
                ds = tl.where(j[None, :] <= i[:, None] + offset, ds, 0.0)
            if PART < BLOCK_D:  # not earlier: registers would spill
                keys = head_rows(k, k_tiles, b, h, j0, k_row, Tk, d, D, BLOCK_D, BN)
            total = tl.dot(ds.to(keys.dtype), keys, total, input_precision=PRECISION)
    inside = (i < Tq)[:, None] & (d < D)[None, :]
    total *= scale
    if sums is not None:  # of queries from Tq on, dO and so dS are 0
        row = _row_of_sums(sums, b, h, i0, Tq, H, D, EACH, BM)
        tl.store(row + d, tl.sum(total, 0), mask=d < D)
        tl.store(row + H * D + d, tl.zeros([BLOCK_D], tl.float32), mask=d < D)
    at = dq + i.to(tl.int64)[:, None] * dq_row + d[None, :]
    tl.store(at, total.to(dq.dtype.element_ty), mask=inside)


KEY_GRADS = {
    (2, 64, True): [config(4, 3, BM=64, BN=64)],
    (2, 64, True, "dropout"): [config(4, 3, BM=32, BN=64)],
    (2, 128, True): [config(4, 2, BM=64, BN=64)],
    (2, 128, True, "dropout"): [config(4, 3, BM=32, BN=64)],
    (2, 256, True): [config(4, 1, BM=16, BN=32)],
    (2, 64, False): [config(4, 2, BM=32, BN=32)],
    (2, 128, False): [config(4, 1, BM=32, BN=32)],
    (2, 256, False): [config(4, 1, BM=16, BN=32)],
    (4, 64, False): [config(8, 1, BM=32, BN=16)],
    (4, 128, False): [config(8, 1, BM=16, BN=16)],
    (4, 256, False): [config(4, 1, BM=16, BN=16)],
    (4, 256, False, "dropout"): [config(8, 1, BM=16, BN=16)],
}


@tuned(
    KEY_GRADS,
    kind_in(KEY_GRADS),
    lambda args: head_shared(2 * args["BN"], 2 * args["BM"], args),
    ["D", "PRECISION", "TILES"],
)
@triton.jit(do_not_specialize=["first_head", "Tq", "Tk"])
def key_grads_kernel(
    q, k, v, dout, dk, dv, sums, terms, masks, q_tiles, dout_tiles,
    first_head, H, Tq, Tk, padded, columns, scale, scale_log2, keep_scale,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, dout_b, dout_h, dout_row,
    dk_b, dk_h, dk_row, dv_b, dv_h, dv_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of BN keys of one head; the keys that most queries see come first.

    A program computes COLUMNS of their columns. Scores are computed transposed, (BN, BM):
    P' = 2^(c (K q' - top) - log_sum),  dP' = dropout(V dO'),  dS' = P' (dP' - delta),
    dV = dropout(P') dO,  dK = scale dS' Q.
    So P' and dS' are left operands, which products take from registers as they are.
    `sums`, if given, has a row of H D columns for each b and j0: the sum of dV over the block.
    """
    head, b, h, j0 = own_head(H, Tk, BN, False, first_head)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    dout += b * dout_b + h * dout_h
    dk += b * dk_b + h * dk_h
    dv += b * dv_b + h * dv_h
    terms += head.to(tl.int64) * 3 * padded
    j, d = j0 + tl.arange(0, BN), tl.arange(0, COLUMNS)
    if COLUMNS < BLOCK_D:
        d += tl.program_id(1) * COLUMNS
    offset = Tk - Tq
    keys = held_rows(k, None, b, h, j0, k_row, Tk, d, D, BLOCK_D, PART, BN)
    values = held_rows(v, None, b, h, j0, v_row, Tk, d, D, BLOCK_D, PART, BN)
    key_total = tl.zeros([BN, COLUMNS], tl.float32)
    value_total = tl.zeros([BN, COLUMNS], tl.float32)
    seen_from = j - offset  # the first query that sees the key
    if masks is not None:
        masks = _masks_of(masks, head - first_head, 0, j0, padded, columns, BM, BN)
    # No query before `first` sees a key of the block, all those from `whole` on see every one.
    first = tl.maximum(j0 - offset, 0) // BM * BM
    whole = tl.minimum(tl.cdiv(tl.maximum(j0 + BN - 1 - offset, 0), BM), tl.cdiv(Tq, BM)) * BM
    for UNMASKED in tl.static_range(2):
        for i0 in tl.range(whole if UNMASKED else first, Tq if UNMASKED else whole, BM):
            i = i0 + tl.arange(0, BM)
            queries = head_rows(q, q_tiles, b, h, i0, q_row, Tq, d, D, COLUMNS, BM)
            do = head_rows(dout, dout_tiles, b, h, i0, dout_row, Tq, d, D, COLUMNS, BM)
            # The first is a case of the second that takes fewer registers.
            at, row = terms + (3 * i0 if BM == TERM_ROWS else _terms_of(i0)), tl.arange(0, BM)
            top, log_sum = tl.load(at + row), tl.load(at + TERM_ROWS + row)
            shown = queries if PART == BLOCK_D else q
            if q.dtype.element_ty == tl.float32:
                # The sum of tf32x3's products depends on which operand is the left one, and a large
                # score must equal the forward's exactly, or its weight would differ.
                s = row_products(
                    shown, i0, q_row, Tq, keys, j0, k_row, Tk, tl.zeros([BM, BN], tl.float32),
                    PRECISION, D, BLOCK_D, PART, BM, BN,
                )  # fmt: skip
                s = tl.trans(s)
            else:
                s = row_products(
                    keys, j0, k_row, Tk, shown, i0, q_row, Tq, tl.zeros([BN, BM], tl.float32),
                    PRECISION, D, BLOCK_D, PART, BN, BM,
                )  # fmt: skip
            p = tl.exp2((s - top[None, :]) * scale_log2 - log_sum[None, :])
            if not UNMASKED:
                p = tl.where(seen_from[:, None] <= i[None, :], p, 0.0)
            weights = p  # without the dropout's factor
            if masks is not None:
                dropped = tl.load(masks + tl.cast(i0 // DROPOUT_ROWS, tl.int64) * columns)
                kept = kept_of(dropped.to(tl.int32), BM, BN, True)
                weights = tl.where(kept, p, 0.0)
            value_total = tl.dot(weights.to(do.dtype), do, value_total, input_precision=PRECISION)
            shown = do if PART == BLOCK_D else dout
            row_delta = tl.load(at + 2 * TERM_ROWS + row)
            start = tl.zeros([BN, BM], tl.float32)
            if masks is None:
                start -= row_delta[None, :]
            ds = row_products(
                values, j0, v_row, Tk, shown, i0, dout_row, Tq, start,
                PRECISION, D, BLOCK_D, PART, BN, BM,
            )  # fmt: skip
            if masks is not None:
                ds = tl.where(kept, ds * keep_scale, 0.0) - row_delta[None, :]
            ds *= p
            key_total = tl.dot(ds.to(queries.dtype), queries, key_total, input_precision=PRECISION)
    if masks is not None:
        value_total *= keep_scale
    inside = (j < Tk)[:, None] & (d < D)[None, :]
    rows = j.to(tl.int64)[:, None]
    tl.store(
        dk + rows * dk_row + d[None, :], (key_total * scale).to(dk.dtype.element_ty), mask=inside
    )
    tl.store(dv + rows * dv_row + d[None, :], value_total.to(dv.dtype.element_ty), mask=inside)
    if sums is not None:  # keys from Tk on have no weights
        row = _row_of_sums(sums, b, h, j0, Tk, H, D, 1, BN)
        tl.store(row + d, tl.sum(value_total, 0), mask=d < D)


def write_grads(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], scale: float, dropout: dict[str, Any],
    with_sums: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes `grads`, dq, dk and dv; like dout and out these are (B, H, T, D) of any strides.

    scale is not negative.

    Returns:
        Parts of the sums over B and T of dq and dk, (P, 2 H D), and of dv, (P', H D), in float32;
        with_sums demands as many queries as keys, and without it there are no parts.
    """
    dq, dk, dv = grads
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    padded, columns = (cdiv(T, TERM_ROWS.value) * TERM_ROWS.value for T in (Tq, Tk))
    terms = lse.new_empty(B, H, 3 * padded)
    heads, masks = B * H, None
    if dropout["seed"] is not None:
        mask = padded // DROPOUT_ROWS.value * columns
        heads = min(heads, max(1, MASK_BYTES // max(1, mask)))
        masks = torch.empty(heads, mask, dtype=torch.uint8, device=q.device)
    shape: dict[str, Any] = {**parts_of(q), "PRECISION": precision(q.dtype)}
    shape["TILES"] = row_tiles(q, k, v, dout)
    args = {"q": q, "masks": masks, **shape}
    tile, key_tile = query_grad_kernel.chosen(args), key_grads_kernel.chosen(args)
    key_tiles = descriptors(shape["TILES"], tile["BN"], k, v)
    query_tiles = descriptors(shape["TILES"], key_tile["BM"], q, dout)
    each, key_sums = 2 if masks is not None else 3, None  # as query_grad_kernel has it
    sums = lse.new_empty(B * cdiv(Tq, tile["BM"]) if with_sums else 0, each * H * D)
    if with_sums and masks is not None:
        key_sums = lse.new_empty(B * cdiv(Tk, key_tile["BN"]), H * D)
    inputs = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    block = width = shape["BLOCK_D"]
    if shape["PART"] < block:  # the threads of AMD's warps want 128 for loads of 16 bytes
        width = 64 if shape["PRECISION"] == "tf32x3" else 128
    for first in range(0, B * H, max(1, heads)):
        some = min(heads, B * H - first)
        sizes = first, H, Tq, Tk, padded, columns, scale, log2_scale(scale)
        if dq.numel():
            queries = lambda meta, some=some: (cdiv(Tq, meta["BM"]) * some,)  # noqa: E731
            query_grad_kernel[queries](
                q, k, v, out, dout, dq, sums if with_sums else None, lse, terms, masks,
                *key_tiles, *sizes,
                *inputs, *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
                **dropout, **shape,
            )  # fmt: skip
        if dk.numel():
            keys = lambda meta, some=some: (cdiv(Tk, meta["BN"]) * some, block // width)  # noqa: E731
            key_grads_kernel[keys](
                q, k, v, dout, dk, dv, key_sums, terms, masks, *query_tiles, *sizes,
                dropout["keep_scale"],
                *inputs, *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                **shape, COLUMNS=width,
            )  # fmt: skip
    columns = 2 * H * D
    return sums[:, :columns], sums[:, columns:] if key_sums is None else key_sums


def _grad_of(x: Tensor) -> Tensor:
    """Reserves a gradient of x's strides, or a contiguous one if rows of x overlap."""
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else x.new_empty(x.shape)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    dropout_p: float, seed: Tensor | None, stream: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::attention_backward."""
    grads = _grad_of(q), _grad_of(k), _grad_of(v)
    heads = dout.transpose(1, 2)  # contiguous if it is the gradient of causal_attention's result
    if not heads.is_contiguous():
        heads = dout.contiguous().transpose(1, 2)
    write_grads(
        heads, q, k, v, out.transpose(1, 2), lse, grads, scale,
        dropout_args(dropout_p, seed, stream, q.device),
    )  # fmt: skip
    return grads
