"""The torch models and functions that gptfast is compared with, as torch users write them.

`CourseGPT` is the course's model, `SdpaGPT` the same model with torch's fused attention; the
functions are gptfast's operators in torch. Letters: B batch, T time, C n_embd, H heads, D head_dim,
V vocab_size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptfast.config import GPTConfig
from gptfast.ops import random


class CourseGPT(nn.Module):
    """Pre-norm GPT with nn.MultiheadAttention and the course's parameter names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, L = config.n_embd, config.n_layer
        self.wpe = nn.Embedding(config.block_size, C)
        self.wte = nn.Embedding(config.vocab_size, C, padding_idx=config.padding_idx)
        if config.attention:
            self.MM = nn.ModuleList(
                nn.MultiheadAttention(C, config.n_head, dropout=config.dropout, batch_first=True)
                for _ in range(L)
            )
            self.scale1 = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.scale2 = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.scale3 = nn.LayerNorm(C)
        self.FFN = nn.ModuleList(
            nn.Sequential(
                nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(config.dropout)
            )
            for _ in range(L)
        )
        self.ln_f = nn.Linear(C, config.vocab_size, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits."""
        T = idx.shape[1]
        hidden = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T, device=idx.device)))
        for layer, ffn in enumerate(self.FFN):
            if hasattr(self, "MM"):
                y = self.scale1[layer](x)
                x = x + self.MM[layer](y, y, y, attn_mask=hidden, need_weights=False)[0]
            x = x + ffn(self.scale2[layer](x))
        return self.ln_f(self.scale3(x))


class SdpaAttention(nn.Module):
    """Attention by scaled_dot_product_attention, with one packed projection to q, k and v."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        packed = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D) each
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class SdpaMLP(nn.Module):
    """The feed-forward network."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, bias=config.bias)
        self.gelu = nn.GELU(approximate="none" if config.gelu == "erf" else "tanh")
        self.c_proj = nn.Linear(4 * C, C, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.drop(self.c_proj(self.gelu(self.c_fc(x))))


class SdpaBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SdpaAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = SdpaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class SdpaGPT(nn.Module):
    """GPT-2 as a torch user writes it, with parameter names and dropout of `gptfast.GPT`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, V = config.n_embd, config.vocab_size
        self.wte = nn.Embedding(V, C, padding_idx=config.padding_idx)
        self.wpe = nn.Embedding(config.block_size, C)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(SdpaBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits."""
        return self.lm_head(self.hidden(idx))

    def hidden(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C), the input of lm_head."""
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


def token_losses(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per token, (B T,), with all logits stored; idx and targets are (B, T)."""
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), reduction="none")


def loss(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, (), with all logits stored; idx and targets are (B, T)."""
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attention of (B, H, T, D) in torch ops of the inputs' dtype, with gptfast's dropout mask."""
    Tq, Tk = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num()
    if dropout_p:
        matrices = weights.shape[0] * weights.shape[1]
        key = random.seed_tensor(seed)
        factors = random.dropout_factors(dropout_p, key, stream, matrices, Tq, Tk)
        weights = weights * factors.reshape(weights.shape).to(weights)
    return weights @ v


def ffn(
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
    seed: int = 0,
) -> Tensor:
    """The feed-forward sublayer of (..., C) in torch ops, with gptfast's dropout mask."""
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], ln_w, ln_b), w1, b1)
    y = F.linear(F.gelu(hidden, approximate="none" if gelu == "erf" else "tanh"), w2, b2)
    if dropout_p:
        key = random.seed_tensor(seed)
        y = y * random.dropout_factors(dropout_p, key, 0, 1, *y.shape)[0].to(y)
    return x + y


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (M, V) logits, all of which are stored."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)
