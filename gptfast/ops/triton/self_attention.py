"""The attention sublayer, composed of the kernels for linear layers and attention.

Letters: B batch, T time, C n_embd, H heads, D head_dim.
"""

import math

import torch
from torch import Tensor

from gptfast.ops.triton.attention import attention
from gptfast.ops.triton.attention_backward import write_grads
from gptfast.ops.triton.launch import absent, dropout_args, wants
from gptfast.ops.triton.linear import linear, multiply, weight_grads
from gptfast.ops.triton.rows import norm_backward


def self_attention(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w_qkv: Tensor, b_qkv: Tensor | None,
    w_proj: Tensor, b_proj: Tensor | None, n_head: int, dropout_p: float, seed: Tensor | None,
    stream: int, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::self_attention."""
    x = x.contiguous()
    qkv, mean, rstd = linear(x, ln_w, ln_b, w_qkv, b_qkv, None)
    q, k, v = _unpacked(qkv, n_head)
    out, lse = attention(q, k, v, 1 / math.sqrt(q.shape[-1]), dropout_p, seed, stream)
    out = out.flatten(2)
    y = multiply(out, w_proj.t(), bias=b_proj, residual=x)
    if keep:
        return y, mean, rstd, qkv, out, lse
    return y, *(kept.new_empty(0, *kept.shape[1:]) for kept in (mean, rstd, qkv, out, lse))


def self_attention_backward(
    dy: Tensor, x: Tensor, ln_w: Tensor, ln_b: Tensor | None, w_qkv: Tensor,
    b_qkv: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, mean: Tensor, rstd: Tensor,
    qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, dropout_p: float, seed: Tensor | None,
    stream: int, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """gptfast::self_attention_backward."""
    x, dy, none = x.contiguous(), dy.contiguous(), absent(x)
    of_proj = weight_grads(dy, out, w_proj, b_proj, wanted=wanted >> 5)
    if not wants(wanted, 0, 4):
        return x.new_empty(0), none, none, none, none, *of_proj
    q, k, v = _unpacked(qkv, n_head)
    dqkv = torch.empty_like(qkv)
    write_grads(
        _heads(multiply(dy, w_proj), n_head), q, k, v, _heads(out, n_head), lse,
        _unpacked(dqkv, n_head), 1 / math.sqrt(q.shape[-1]),
        dropout_args(dropout_p, seed, stream, x.device),
    )  # fmt: skip
    norm = mean, rstd, ln_w, ln_b
    of_qkv = weight_grads(dqkv, x, w_qkv, b_qkv, norm, wanted=wanted >> 3)
    if not wants(wanted, 0, 2):
        return x.new_empty(0), none, none, *of_qkv, *of_proj
    dn = multiply(dqkv, w_qkv)
    return *norm_backward(dn, x, dy, *norm, wanted=wanted), *of_qkv, *of_proj


def _unpacked(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v as (B, H, T, D) views of the packed qkv (B, T, 3 C)."""
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _heads(x: Tensor, n_head: int) -> Tensor:
    """Returns x (B, T, C) as a view (B, H, T, D)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)
