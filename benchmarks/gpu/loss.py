"""Output projection and cross-entropy with gradients at GPT-2's size, with peak memory.

Letters: M rows, K columns, V vocab_size.
"""

import functools
from collections.abc import Iterator

import torch
from bench_cross_entropy import cross_entropy
from common import Row
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((16384, 768, 50257),)
FULL_SHAPES = ((4096, 384, 66), (4096, 128, 66))
CHUNK = 2048  # rows of logits at a time


def in_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients in torch ops that store CHUNK rows of logits at a time."""
    weight = weight.detach().requires_grad_()
    loss, dx, dweight = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        part = x[rows].detach().requires_grad_()
        logits = F.linear(part, weight).float()
        own = F.cross_entropy(logits, targets[rows], reduction="sum") / len(x)
        dx[rows], dw = torch.autograd.grad(own, (part, weight))
        dweight += dw
        loss += own.detach()
    return [loss, dx, dweight]


def rows(full: bool) -> Iterator[Row]:
    """Yields the rows."""
    others = {"torch, chunks": in_chunks}
    for M, K, V in (*SHAPES, *(FULL_SHAPES if full else ())):
        name = f"linear + cross-entropy {M}x{K}x{V} forward+backward"
        for dtype in ("bf16", "fp32") if full else ("bf16",):
            yield Row(name, dtype, functools.partial(cross_entropy, M, K, V, dtype, others))
