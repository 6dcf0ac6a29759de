"""A GPT block and its parts. Plain layers run as fused operators; any other layer is called.

Letters: B batch, T time, C n_embd, H heads. Modules have GPT-2's names.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptfast import plain
from gptfast.config import GPTConfig
from gptfast.errors import BackendError
from gptfast.ops import reference
from gptfast.ops.random import dropout_factors

# Attention as a function: the packed projection (B, T, 3 C) and the number of heads -> (B, T, C).
Attend = Callable[[Tensor, int], Tensor]


class ForwardContext(NamedTuple):
    """What one forward pass computes with: the operators, and dropout's probability and seed."""

    ops: ModuleType
    dropout_p: float
    seed: Tensor | None
    strict: bool = False  # whether a layer that is not plain is an error
    recompute: bool = False  # whether a block keeps its input alone for the backward pass

    def fuses(self, replaced: str | None) -> bool:
        """Returns whether a fused operator computes a part of the model.

        Args:
            replaced: The first layer of the part that is not plain; None if all are.

        Raises:
            BackendError: A layer is not plain, and the context is strict.
        """
        if replaced is not None and self.strict:
            raise BackendError(f"model: {not_fused(replaced)}; backend='auto' calls it")
        return replaced is None

    def dropped(self, x: Tensor, stream: int) -> Tensor:
        """Applies dropout to an activation (B, T, C), with the same mask as the kernels."""
        if self.seed is None:
            return x
        rows = x.shape[:-1].numel()
        factors = dropout_factors(self.dropout_p, self.seed, stream, 1, rows, x.shape[-1])
        return x * factors.reshape(x.shape).to(x)

    def added(self, x: Tensor, y: Tensor, stream: int) -> Tensor:
        """Adds y to the residual stream x in float32, after dropout unless its stream is 0."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = y.to(wide)
        return (x.to(wide) + (self.dropped(y, stream) if stream else y)).to(x.dtype)


def not_fused(reason: str) -> str:
    """Returns the sentence which says that a layer prevents the use of the kernels."""
    return f"the fused kernels compute plain layers, and {reason}"


def packed_attention(causal_attention: Callable[..., Tensor], qkv: Tensor, n_head: int) -> Tensor:
    """Applies attention to a packed projection, (B, T, 3 C) -> (B, T, C)."""
    q, k, v = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    return causal_attention(q, k, v).transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    """The packed query, key and value projection and the output projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, *, attend: Attend | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). `attend` replaces causal attention without dropout."""
        qkv = self.c_attn(x)
        if attend is None:
            return self.c_proj(packed_attention(reference.causal_attention, qkv, self.n_head))
        return self.c_proj(attend(qkv, self.n_head))


class MLP(nn.Module):
    """The two layers of the feed-forward network."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), without dropout."""
        approximate = "none" if self.gelu == "erf" else "tanh"
        return self.c_proj(F.gelu(self.c_fc(x), approximate=approximate))


def _is_attention(module: nn.Module) -> str | None:
    return plain.unmodified(module, CausalSelfAttention)


def _is_mlp(module: nn.Module) -> str | None:
    return plain.unmodified(module, MLP)


def _params(ln: nn.Module, half: nn.Module, first: str) -> tuple[Tensor | None, ...]:
    """Returns the parameters of a norm and of the two linear layers after it."""
    layers: Any = half._modules
    return (
        *plain.params(ln), *plain.params(layers[first]), *plain.params(layers["c_proj"])
    )  # fmt: skip


class Block(nn.Module):
    """Computes x + attention(LN(x)), then x + FFN(LN(x)); without attention only the second.

    A half is one fused operator if all of its layers are plain. Otherwise the block calls its norm,
    then `attn` or `mlp` with the result. A CausalSelfAttention, or a module that contains one, also
    receives the attention function as `attend`. The block itself adds the residual, and applies
    dropout to the result of `mlp` and, where the config says so, of `attn`.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.stream = 1 + 2 * layer  # of the attention weights' dropout; the FFN has the next one
        # The dropout of attention's output has a stream after those of all layers; 0: it has none.
        self.proj_stream = 1 + 2 * config.n_layer + layer if config.attn_proj_dropout else 0
        if config.attention:
            self.ln_1 = nn.LayerNorm(config.n_embd, eps=reference.LAYER_NORM_EPS, bias=config.bias)
            self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=reference.LAYER_NORM_EPS, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """(B, T, C) -> (B, T, C).

        With `context.recompute`, the backward pass computes the block once more, with the same
        dropout masks. It raises BackendError if the weights have changed since the forward pass.
        """
        if not context.recompute:
            return self._computed(x, context)
        seen = self._weights()

        def compute(x: Tensor) -> Tensor:
            if self._weights() != seen:
                raise BackendError(
                    f"model: with recompute the weights of h.{self.layer} must be the same in the"
                    " backward pass as in the forward pass, got others"
                )
            return self._computed(x, context)

        # Layers of the user's own may draw random numbers; ours have the key of their masks.
        own = plain.unmodified(self, Block) or self.first_replaced(self.layers())
        return checkpoint(compute, x, use_reentrant=False, preserve_rng_state=own is not None)

    def _weights(self) -> list[tuple[int, int]]:
        """What tells whether a weight was replaced or written."""
        if torch.compiler.is_compiling():
            return []
        return [(id(param), param._version) for param in self.parameters()]

    def _computed(self, x: Tensor, context: ForwardContext) -> Tensor:
        if "attn" in self._modules:
            if context.fuses(self.first_replaced(self.attention_layers())):
                own: Any = self._modules
                attn = own["attn"]
                x = context.ops.layer_norm_attention(
                    x, *_params(own["ln_1"], attn, "c_attn"), n_head=attn.__dict__["n_head"],
                    dropout_p=context.dropout_p, seed=context.seed, stream=self.stream,
                    proj_dropout_p=context.dropout_p if self.proj_stream else 0.0,
                    proj_stream=self.proj_stream,
                )  # fmt: skip
            else:
                x = self._called_attention(self._attend(x.dtype, context), x, context)
        return self.feed_forward(x, context)

    def forward_with(self, attend: Attend, x: Tensor, context: ForwardContext) -> Tensor:
        """Computes `forward` with `attend` as its attention, for example attention with a cache."""
        if "attn" in self._modules:
            if context.fuses(self.first_replaced(self.attention_layers())):
                *qkv, proj_w, proj_b = _params(self.ln_1, self.attn, "c_attn")
                y = attend(context.ops.layer_norm_linear(x, *qkv), self.attn.n_head)
                x = context.ops.linear_residual(y, proj_w, proj_b, x)
            else:
                x = self._called_attention(attend, x, context)
        return self.feed_forward(x, context)

    def feed_forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Computes the second half, (B, T, C) -> (B, T, C)."""
        if context.fuses(self.first_replaced(self.feed_forward_layers())):
            own: Any = self._modules
            mlp = own["mlp"]
            return context.ops.layer_norm_ffn(
                x, *_params(own["ln_2"], mlp, "c_fc"), gelu=mlp.__dict__["gelu"],
                dropout_p=context.dropout_p, seed=context.seed, stream=self.stream + 1,
            )  # fmt: skip
        return context.added(x, self.mlp(self.ln_2(x).to(x.dtype)), self.stream + 1)

    def attention_layers(self) -> Iterator[plain.Layer]:
        """Yields the layers of the first half. `attn` comes before those inside it."""
        own: Any = self._modules  # three times as quick as nn.Module's attributes
        yield "ln_1", own["ln_1"], plain.norm
        yield "attn", own["attn"], _is_attention
        own = own["attn"]._modules
        yield "attn.c_attn", own["c_attn"], plain.linear
        yield "attn.c_proj", own["c_proj"], plain.linear

    def feed_forward_layers(self) -> Iterator[plain.Layer]:
        """Yields the layers of the second half. `mlp` comes before those inside it."""
        own: Any = self._modules
        yield "ln_2", own["ln_2"], plain.norm
        yield "mlp", own["mlp"], _is_mlp
        own = own["mlp"]._modules
        yield "mlp.c_fc", own["c_fc"], plain.linear
        yield "mlp.c_proj", own["c_proj"], plain.linear

    def layers(self) -> Iterator[plain.Layer]:
        """Yields all layers that must be plain for the kernels."""
        if "attn" in self._modules:
            yield from self.attention_layers()
        yield from self.feed_forward_layers()

    def first_replaced(self, layers: Iterator[plain.Layer]) -> str | None:
        """Describes the first of these layers that is not plain; None if all are."""
        found = plain.first_replaced(layers)
        return None if found is None else f"h.{self.layer}.{found}"

    def _attend(self, dtype: torch.dtype, context: ForwardContext) -> Attend:
        def attention(*qkv: Tensor) -> Tensor:
            return context.ops.causal_attention(
                *qkv, dropout_p=context.dropout_p, seed=context.seed, stream=self.stream
            )

        # A user's layer may return another dtype than the residual stream has.
        return lambda qkv, n_head: packed_attention(attention, qkv.to(dtype), n_head)

    def _called_attention(self, attend: Attend, x: Tensor, context: ForwardContext) -> Tensor:
        y = self.ln_1(x).to(x.dtype)
        if any(isinstance(module, CausalSelfAttention) for module in self.attn.modules()):
            out = self.attn(y, attend=attend)
        else:
            out = self.attn(y)
        return context.added(x, out, self.proj_stream)
