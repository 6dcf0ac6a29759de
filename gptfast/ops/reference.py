"""Every operation in plain torch: the specification that the kernels are tested and timed against.

Letters: B batch, T time, C n_embd, H heads, D head_dim, F 4C, V vocab_size. Half-precision inputs
are computed in float32, others in their own dtype (float64 serves as the oracle). Autocast has no
effect.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops.random import dropout_factors, seed_tensor

LAYER_NORM_EPS = 1e-5


def _dropout(
    x: Tensor, p: float, seed: int | Tensor | None, stream: int, matrices: int = 1
) -> Tensor:
    if p == 0.0 or x.numel() == 0:
        return x
    factors = dropout_factors(
        p, seed_tensor(seed), stream, matrices, x.numel() // x.shape[-1] // matrices, x.shape[-1]
    )
    return x * factors.reshape(x.shape).to(x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias, LAYER_NORM_EPS)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def attention_weights(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k' + causal mask), (B, H, Tq, Tk); fully masked rows are 0."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = _wide(q)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * scale  # (B, H, Tq, Tk)
    Tq, Tk = scores.shape[-2:]
    seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0)


def _weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """weights @ v over unmasked keys only, so that nan or inf in masked values has no effect."""
    finite = v.isfinite()
    others = v.detach().masked_fill(finite, 0.0).cumsum(-2)  # sum over the keys up to each one
    Tq, Tk = weights.shape[-2:]
    seen = F.pad(others, (0, 0, max(0, Tq - Tk), 0))[..., max(0, Tk - Tq) :, :]
    return weights @ v.masked_fill(~finite, 0.0) + seen


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    scale: float | None = None,
) -> Tensor:
    """See `gptfast.ops.causal_attention`."""
    with torch.autocast(q.device.type, enabled=False):
        wide = _wide(q)
        weights = attention_weights(q, k, scale)
        weights = _dropout(weights, dropout_p, seed, stream, weights.shape[0] * weights.shape[1])
        return _weighted_sum(weights, v.to(wide)).to(q.dtype)


def layer_norm_linear(
    x: Tensor, ln_w: Tensor, ln_b: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """See `gptfast.ops.layer_norm_linear`."""
    with torch.autocast(x.device.type, enabled=False):
        return _linear(_layer_norm(x.to(_wide(x)), ln_w, ln_b), weight, bias).to(x.dtype)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """See `gptfast.ops.linear_residual`."""
    with torch.autocast(x.device.type, enabled=False):
        return (residual.to(_wide(x)) + _linear(x.to(_wide(x)), weight, bias)).to(x.dtype)


def layer_norm_attention(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor | None,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    n_head: int,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    proj_dropout_p: float = 0.0,
    proj_stream: int = 0,
) -> Tensor:
    """See `gptfast.ops.layer_norm_attention`."""
    qkv = layer_norm_linear(x, ln_w, ln_b, w_qkv, b_qkv).unflatten(-1, (3, n_head, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    key = seed_tensor(seed) if dropout_p > 0.0 or proj_dropout_p > 0.0 else None
    out = causal_attention(q, k, v, dropout_p=dropout_p, seed=key, stream=stream)
    out = out.transpose(1, 2).flatten(2)
    with torch.autocast(x.device.type, enabled=False):
        wide = _wide(x)
        y = _dropout(_linear(out.to(wide), w_proj, b_proj), proj_dropout_p, key, proj_stream)
        return (x.to(wide) + y).to(x.dtype)


def layer_norm_ffn(
    x: Tensor,
    ln_w: Tensor,
    ln_b: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    gelu: str = "erf",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """See `gptfast.ops.layer_norm_ffn`."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(_wide(x))
        hidden = F.gelu(
            _linear(_layer_norm(wide, ln_w, ln_b), w1, b1),
            approximate="none" if gelu == "erf" else "tanh",
        )
        return (wide + _dropout(_linear(hidden, w2, b2), dropout_p, seed, stream)).to(x.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ln_w: Tensor | None = None,
    ln_b: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """See `gptfast.ops.linear_cross_entropy`."""
    check_targets("linear_cross_entropy", targets, ignore_index, weight.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(_wide(x))
        normalized = wide if ln_w is None else _layer_norm(wide, ln_w, ln_b)
        logits = _linear(normalized, weight, None).reshape(-1, weight.shape[0])
        losses = F.cross_entropy(
            logits,
            targets.flatten(),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        ).view(targets.shape)
        weights = (targets != ignore_index).to(losses)
        if token_weights is not None:
            weights = torch.where(targets != ignore_index, token_weights.to(losses), 0.0)
            losses = losses * weights
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        total = weights.sum()
        return torch.where(total == 0, 0.0, losses.sum() / (total + (total == 0)))


def check_targets(op: str, targets: Tensor, ignore_index: int, V: int) -> None:
    """Raises ValueError unless the targets are in [0, V) or `ignore_index`; a GPU asserts it."""
    if targets.is_cpu:
        check_range(f"{op}: targets", targets.masked_fill(targets == ignore_index, 0), V)


def check_range(what: str, idx: Tensor, V: int) -> None:
    """Raises ValueError unless all indices are in [0, V).

    A compiled graph, a transform, a tracer or fake tensors cannot branch on values: there torch
    checks, when it computes.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return
    if not idx.numel() or V == 0 or type(idx) is not Tensor:
        return
    least, most = int(idx.min()), int(idx.max())
    if least < 0 or most >= V:
        raise ValueError(f"{what} must be in [0, {V}), got {least} to {most}")


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `gptfast.ops.embedding`."""
    V = wte.shape[0]
    if padding_idx is not None and not 0 <= padding_idx < V:
        raise ValueError(f"embedding: padding_idx must be None or in [0, {V}), got {padding_idx}")
    check_range("embedding: idx", idx, V)
    with torch.autocast(idx.device.type, enabled=False):
        x = F.embedding(idx, wte, padding_idx) + wpe[: idx.shape[-1]]
        return _dropout(x, dropout_p, seed, stream).to(dtype or x.dtype)
