"""The attention sublayer, composed of the kernels for linear layers and attention.

Letters: B batch, T time, C n_embd, H heads, D head_dim.
"""

import math

import torch
from torch import Tensor

from gptfast.ops.triton.attention import attention
from gptfast.ops.triton.attention_backward import write_grads
from gptfast.ops.triton.casts import cast
from gptfast.ops.triton.launch import dropout_args, or_absent, wants
from gptfast.ops.triton.linear import input_grad, linear, multiply, weight_grad
from gptfast.ops.triton.rows import Sums, column_sums, dropped_and_sums, layer_norm, norm_grads


def self_attention(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w_qkv: Tensor, b_qkv: Tensor | None,
    w_proj: Tensor, b_proj: Tensor | None, n_head: int, proj_dropout_p: float, proj_stream: int,
    dropout_p: float, seed: Tensor | None, stream: int, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::self_attention."""
    x = x.contiguous()
    w_qkv, w_proj = cast(x.dtype, w_qkv, w_proj)
    qkv, mean, rstd = linear(x, ln_w, ln_b, w_qkv, b_qkv, None)
    q, k, v = _unpacked(qkv, n_head)
    out, lse = attention(q, k, v, 1 / math.sqrt(q.shape[-1]), dropout_p, seed, stream)
    out = out.flatten(2)
    dropout = dropout_args(proj_dropout_p, seed, proj_stream, x.device)
    y = multiply(out, w_proj.t(), bias=b_proj, dropout=dropout, residual=x)
    if keep:
        return y, mean, rstd, qkv, out, lse
    return y, *(kept.new_empty(0, *kept.shape[1:]) for kept in (mean, rstd, qkv, out, lse))


def self_attention_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w_qkv: Tensor,
    b_qkv: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, mean: Tensor, rstd: Tensor,
    qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, proj_dropout_p: float, proj_stream: int,
    dropout_p: float, seed: Tensor | None, stream: int, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::self_attention_backward."""
    x, dy, sums = x.contiguous(), dy.contiguous(), Sums()
    n = dx = x.new_empty(0)
    dln_w = dln_b = dw_qkv = db_qkv = dw_proj = db_proj = None
    d, of_d = dy, None  # the projection's gradient, and parts of its sum over the rows
    dropout = dropout_args(proj_dropout_p, seed, proj_stream, x.device)
    if dropout["seed"] is not None:
        d, of_d = dropped_and_sums(dy, dropout)
    if wants(wanted, 5):
        dw_proj = weight_grad(d, out, w_proj)
    if wants(wanted, 0, 4):
        through = wants(wanted, 0, 2)  # w_qkv as well
        qkv_weight, proj_weight = cast(x.dtype, w_qkv, w_proj) if through else (w_qkv, w_proj)
        q, k, v = _unpacked(qkv, n_head)
        dqkv = torch.empty_like(qkv)
        of_qkv = write_grads(
            _heads(input_grad(d, proj_weight), n_head), q, k, v, _heads(out, n_head), lse,
            _unpacked(dqkv, n_head), 1 / math.sqrt(q.shape[-1]),
            dropout_args(dropout_p, seed, stream, x.device),
            b_qkv is not None and wants(wanted, 4),
        )  # fmt: skip
        if through:
            dn = input_grad(dqkv, qkv_weight)
            back = norm_grads(dn, x, dy, mean, rstd, ln_w, ln_b, wants(wanted, 3))
            dx, n = back.dx, back.n
            of_d = back.sums[:, 2] if of_d is None else of_d
            dln_w, dln_b = sums.of_norm(back, ln_w, ln_b, wanted)
        elif wants(wanted, 3):
            n, _, _ = layer_norm(x, ln_w, ln_b)
        if wants(wanted, 3):
            dw_qkv = weight_grad(dqkv, n, w_qkv)
        if b_qkv is not None and wants(wanted, 4):
            db_qkv = sums.of(b_qkv, *of_qkv)
    if b_proj is not None and wants(wanted, 6):
        db_proj = sums.of(b_proj, column_sums(dy) if of_d is None else of_d)
    sums.add()
    return dx, *or_absent(x, dln_w, dln_b, dw_qkv, db_qkv, dw_proj, db_proj)


def _unpacked(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v as (B, H, T, D) views of the packed qkv (B, T, 3 C)."""
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _heads(x: Tensor, n_head: int) -> Tensor:
    """Returns x (B, T, C) as a view (B, H, T, D)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)
