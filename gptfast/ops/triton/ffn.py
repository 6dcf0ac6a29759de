"""The feed-forward sublayer as two fused linear layers, and its backward.

Letters: C n_embd, F hidden columns, M rows (all leading dimensions).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton import products
from gptfast.ops.triton.casts import cast
from gptfast.ops.triton.launch import cdiv, dropout_args, kernel, or_absent, wants
from gptfast.ops.triton.linear import input_grad, multiply, weight_grad
from gptfast.ops.triton.rows import Sums, column_sums, dropped_and_sums, layer_norm, norm_grads
from gptfast.ops.triton.tiles import (
    gelu_and_slope,
    load_tile,
    parts_of,
    product,
    store_tile,
    tile_at,
)


@kernel
@triton.jit(do_not_specialize=["M"])
def hidden_grad_kernel(
    a, b, M, N, K, b_row, b_column, before, dhidden, hidden, sums, GELU: tl.constexpr,
    DESCRIBED: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dU = (A B) gelu'(U); gelu(U), which is recomputed; each tile's sum of dU over its rows.

    A (M, K) is the gradient of the second layer's output, B (K, N) that layer's weight, `before`
    holds U. `hidden` and `sums` are optional.
    """
    tl.assume(K > 0)
    COLUMNS: tl.constexpr = BN // PARTS
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    done = tl.program_id(0)  # see linear_kernel
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m0, n0 = tile_at(tile, M, N, BM, BN, GROUP)
        acc = product(a, b, m0, n0, M, N, K, b_row, b_column, DESCRIBED, PRECISION, BM, BN, BK)
        m0, n0 = tile_at(done, M, N, BM, BN, GROUP)
        done += tl.num_programs(0)
        parts = parts_of(acc, BM, BN, PARTS)
        for i in tl.static_range(PARTS):
            n1 = n0 + i * COLUMNS
            if i == 0 or DESCRIBED is None:
                u = load_tile(before, m0, n1, M, N, BM, COLUMNS)
            value, slope = gelu_and_slope(u.to(tl.float32), GELU)
            du = parts[i] * slope
            if hidden is not None:
                store_tile(hidden, value, m0, n1, M, N, STORED, BM, COLUMNS)
            store_tile(dhidden, du, m0, n1, M, N, STORED, BM, COLUMNS)
            if i + 1 < PARTS and DESCRIBED is not None:  # on its way while this part is summed
                u = load_tile(before, m0, n1 + COLUMNS, M, N, BM, COLUMNS)
            if sums is not None:
                n = n1 + tl.arange(0, COLUMNS)
                if DESCRIBED is None:  # otherwise rows from M on are 0
                    du = tl.where((m0 + tl.arange(0, BM) < M)[:, None], du, 0.0)
                tl.store(sums + (m0 // BM).to(tl.int64) * N + n, tl.sum(du, 0), mask=n < N)


def ffn(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, gelu: str, dropout_p: float, seed: Tensor | None, stream: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """gptfast::ffn."""
    x = x.contiguous()
    n, mean, rstd = layer_norm(x, ln_w, ln_b)
    rows = x.numel() // x.shape[-1] if keep else 0
    before = x.new_empty(rows, w1.shape[0])
    w1, w2 = cast(x.dtype, w1, w2)
    hidden = multiply(n, w1.t(), bias=b1, gelu=gelu, before=before if keep else None)
    dropout = dropout_args(dropout_p, seed, stream, x.device)
    y = multiply(hidden, w2.t(), bias=b2, dropout=dropout, residual=x)
    return y, mean[:rows], rstd[:rows], before


def ffn_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, mean: Tensor, rstd: Tensor, before: Tensor,
    gelu: str, dropout_p: float, seed: Tensor | None, stream: int, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::ffn_backward."""
    x, dy, sums = x.contiguous(), dy.contiguous(), Sums()
    n = dx = x.new_empty(0)
    dln_w = dln_b = dw1 = db1 = dw2 = db2 = None
    dropout = dropout_args(dropout_p, seed, stream, x.device)
    through = wants(wanted, 0, 2)  # w1 as well
    first, second = cast(x.dtype, w1, w2) if through else (w1, w2.to(x.dtype))
    d, of_d = dy, None
    if dropout["seed"] is not None:
        d, of_d = dropped_and_sums(dy, dropout)
    du, hidden, of_du = _hidden_grad(
        d, second, before, gelu, wants(wanted, 5), b1 is not None and wants(wanted, 4)
    )
    if wants(wanted, 5):
        dw2 = weight_grad(d, hidden, w2)
    del hidden
    if through:
        dn = input_grad(du, first)
        back = norm_grads(dn, x, dy, mean, rstd, ln_w, ln_b, wants(wanted, 3))
        dx, n = back.dx, back.n
        dln_w, dln_b = sums.of_norm(back, ln_w, ln_b, wanted)
        of_d = back.sums[:, 2] if of_d is None else of_d
    elif wants(wanted, 3):
        n, _, _ = layer_norm(x, ln_w, ln_b)
    if wants(wanted, 3):
        dw1 = weight_grad(du, n, w1)
    if b1 is not None and wants(wanted, 4):
        db1 = sums.of(b1, of_du)
    if b2 is not None and wants(wanted, 6):
        db2 = sums.of(b2, column_sums(dy) if of_d is None else of_d)
    sums.add()
    return dx, *or_absent(x, dln_w, dln_b, dw1, db1, dw2, db2)


def _hidden_grad(
    d: Tensor, w2: Tensor, before: Tensor, gelu: str, with_hidden: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dU, gelu(U) or nothing, and parts (P, N) of dU's sum over the rows or nothing."""
    M, N = before.shape
    du, hidden = torch.empty_like(before), torch.empty_like(before if with_hidden else before[:0])
    if not before.numel():
        return du, hidden, d.new_empty(0, N, dtype=torch.float32)
    how = products.product(d.view(M, -1), w2, products.EPILOGUE_TILES)
    parts = cdiv(M, how.options["BM"]) if with_sums else 0
    sums = d.new_empty(parts, N, dtype=torch.float32)
    hidden_grad_kernel[how.grid](
        *how.operands, before, how.result(du), how.result(hidden) if with_hidden else None,
        sums if with_sums else None, GELU=gelu, **how.options,
    )  # fmt: skip
    return du, hidden, sums
