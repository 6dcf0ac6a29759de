"""What each attention head does: what it attends to, and what it adds to the residual stream.

All of it is computed by the reference, without dropout.

Letters: B batch, T time, C n_embd, H heads, D head_dim, L layers.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gptfast.errors import ConfigError
from gptfast.modules import Block, ForwardContext, packed_attention
from gptfast.ops import reference

if TYPE_CHECKING:
    from gptfast.model import GPT


class AttentionTerms(NamedTuple):
    """The attention's output as a sum: `heads`, summed over H, and `bias` are `output`."""

    heads: Tensor  # (L, B, H, T, C)
    bias: Tensor  # (L, B, T, C): what is left without any head, c_proj's bias
    output: Tensor  # (L, B, T, C), computed from all heads at once


class Shares(NamedTuple):
    """How much each term adds to the attention's output at a position.

    A projection is the length of a term along the output, negative where it points away from it:
    the projections of a layer add up to the norm of its output.
    """

    names: list[str]  # of the N terms: a number per head, and "bias" where there is one
    norms: Tensor  # (L, N)
    projections: Tensor  # (L, N)
    output: Tensor  # (L,), the norm of the attention's output
    difference: float  # the largest one between the sum of the terms and the output


def attention_weights(model: "GPT", idx: Tensor) -> Tensor:
    """See `GPT.attention_weights`."""
    with torch.no_grad():
        layers = _layers(model, idx, "attention_weights")
        return torch.stack([reference.attention_weights(each.q, each.k) for each in layers])


def attention_terms(model: "GPT", idx: Tensor) -> AttentionTerms:
    """Computes what `GPT.attention_contributions` says, with the rest of the attention's output."""
    with torch.no_grad():
        layers = _layers(model, idx, "attention_contributions")
        heads, bias, output = zip(*map(_terms, layers), strict=True)
        return AttentionTerms(torch.stack(heads), torch.stack(bias), torch.stack(output))


def entropy(weights: Tensor) -> Tensor:
    """The entropy in nats of each row of attention weights, (..., T, T) -> (..., T)."""
    return torch.special.entr(weights).sum(-1)


def shares(terms: AttentionTerms, row: int, position: int) -> Shares:
    """Measures the terms at a position of a row of the batch."""
    parts = terms.heads[:, row, :, position]  # (L, H, C)
    names = [str(head) for head in range(parts.shape[1])]
    bias, output = terms.bias[:, row, position], terms.output[:, row, position]  # (L, C)
    if bias.any():
        names.append("bias")
        parts = torch.cat([parts, bias[:, None]], 1)  # (L, H + 1, C)
    size = output.norm(dim=-1, keepdim=True)  # (L, 1)
    direction = output / size.clamp(min=torch.finfo(size.dtype).tiny)  # (L, C)
    return Shares(
        names,
        norms=parts.norm(dim=-1),
        projections=(parts * direction[:, None]).sum(-1),
        output=size[:, 0],
        difference=(parts.sum(1) - output).abs().max().item(),
    )


class _Layer(NamedTuple):
    """The attention of a block: the residual stream before it, and what its heads got."""

    block: Block
    x: Tensor  # (B, T, C)
    q: Tensor  # (B, H, T, D), as k and v
    k: Tensor
    v: Tensor


def _layers(model: "GPT", idx: Tensor, asked: str) -> Iterator[_Layer]:
    if not model.config.attention:
        raise ConfigError("a model with attention=False has no attention weights")
    model.check_idx(idx)
    qkv: list[tuple[Tensor, ...]] = []

    def attention(*parts: Tensor) -> Tensor:
        qkv.append(parts)
        return reference.causal_attention(*parts)

    def attend(packed: Tensor, n_head: int) -> Tensor:
        return packed_attention(attention, packed, n_head)

    context = ForwardContext(reference, 0.0, None)
    x = model.embed(idx, context)
    for layer, block in enumerate(model.blocks):
        following = block.forward_with(attend, x, context)
        if not qkv:
            raise ConfigError(
                f"{asked}: h.{layer}.attn must be a CausalSelfAttention, got"
                f" {type(block.attn).__name__}, which does not show its weights"
            )
        yield _Layer(block, x, *qkv.pop())
        qkv.clear()
        x = following


def _terms(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of a layer, as AttentionTerms has them."""
    heads = reference.causal_attention(layer.q, layer.k, layer.v)  # (B, H, T, D)
    if layer.block.first_replaced(layer.block.attention_layers()) is not None:
        return _called_terms(layer, heads)
    with torch.autocast(heads.device.type, enabled=False):
        heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
        c_proj = layer.block.attn.c_proj
        weight = c_proj.weight.to(heads.dtype)  # (C, C)
        bias = weight.new_zeros(()) if c_proj.bias is None else c_proj.bias.to(heads.dtype)
        output = F.linear(_concatenated(heads), weight) + bias  # (B, T, C)
        by_head = weight.unflatten(1, (heads.shape[1], -1))  # (C, H, D)
        return torch.einsum("bhtd,chd->bhtc", heads, by_head), bias.expand_as(output), output


def _called_terms(layer: _Layer, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The terms where layers are called: `attn` is, with each head alone and with none.

    Raises:
        ConfigError: The output of `attn` is no sum over its heads.
    """
    block = layer.block
    y = block.ln_1(layer.x).to(layer.x.dtype)
    wide = torch.promote_types(y.dtype, torch.float32)

    def attn(kept: Tensor) -> Tensor:
        return block.attn(y, attend=lambda *_: _concatenated(kept)).to(wide)  # (B, T, C)

    output, bias = attn(heads), attn(torch.zeros_like(heads))
    only = torch.eye(heads.shape[1], device=heads.device).bool()[:, :, None, None]  # (H, H, 1, 1)
    terms = torch.stack([attn(heads.where(head, 0.0)) for head in only], 1)  # (B, H, T, C)
    terms = terms - bias[:, None]
    difference = (terms.sum(1) + bias - output).abs().max()
    largest = torch.stack([terms.abs().max(), bias.abs().max(), output.abs().max()]).max()
    if difference > heads.shape[1] * torch.finfo(y.dtype).eps ** 0.5 * largest:
        raise ConfigError(
            f"attention_contributions: h.{block.layer}.attn must be linear in its heads' outputs,"
            " but what it makes of each head alone does not add up to what it makes of all"
        )
    return terms, bias, output


def _concatenated(heads: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)."""
    return heads.transpose(1, 2).flatten(2)
