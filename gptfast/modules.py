"""A GPT block and its parts: fused where their layers are plain, else by calling these.

Letters: B batch, T time, C n_embd, H heads. Modules have GPT-2's names.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptfast import plain
from gptfast.config import GPTConfig
from gptfast.errors import BackendError
from gptfast.ops import reference
from gptfast.ops.random import dropout_factors

# A packed projection (B, T, 3 C) and the number of its heads -> (B, T, C).
Attend = Callable[[Tensor, int], Tensor]


class ForwardContext(NamedTuple):
    """How one forward pass computes: which operators, and the dropout's probability and key."""

    ops: ModuleType
    dropout_p: float
    seed: Tensor | None
    strict: bool = False  # the kernels or an error, whatever the modules are

    def fuses(self, oddity: str | None) -> bool:
        """Whether an operator does the part with this first layer that is not plain, if any.

        Raises:
            BackendError: There is one, and the kernels are asked for.
        """
        if oddity is not None and self.strict:
            raise BackendError(f"model: {not_fused(oddity)}; backend='auto' calls it")
        return oddity is None

    def dropped(self, x: Tensor, stream: int) -> Tensor:
        """Dropout of an activation, (B, T, C), by the mask that the kernels have for it."""
        if self.seed is None:
            return x
        rows = x.shape[:-1].numel()
        factors = dropout_factors(self.dropout_p, self.seed, stream, 1, rows, x.shape[-1])
        return x * factors.reshape(x.shape).to(x)


def not_fused(oddity: str) -> str:
    """The sentence that a layer stops the kernels."""
    return f"the fused kernels compute plain layers, and {oddity}"


def packed_attention(causal_attention: Callable[..., Tensor], qkv: Tensor, n_head: int) -> Tensor:
    """Attention of the packed projection (B, T, 3 C) -> (B, T, C)."""
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
        """(B, T, C) -> (B, T, C); `attend` in place of causal attention without dropout."""
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
    return plain.untouched(module, CausalSelfAttention)


def _is_mlp(module: nn.Module) -> str | None:
    return plain.untouched(module, MLP)


def _params(ln: nn.Module, half: nn.Module, first: str) -> tuple[Tensor | None, ...]:
    """The parameters of a norm and of the two layers of the half of a block that follows it."""
    layers: Any = half._modules
    return (
        *plain.params(ln), *plain.params(layers[first]), *plain.params(layers["c_proj"])
    )  # fmt: skip


class Block(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)); the first is left out where the config says so.

    Each half is one operator where its layers are plain. Else its norm is called, then `attn` or
    `mlp` with the result; a CausalSelfAttention, or what wraps one, also gets the attention itself
    as `attend`. The sum and the dropout of `mlp`'s result are the block's.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.stream = 1 + 2 * layer  # of the attention weights' dropout; the FFN has the next
        if config.attention:
            self.ln_1 = nn.LayerNorm(config.n_embd, eps=reference.LAYER_NORM_EPS, bias=config.bias)
            self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=reference.LAYER_NORM_EPS, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if "attn" in self._modules:
            if context.fuses(self.oddity(self.attention_layers())):
                own: Any = self._modules
                attn = own["attn"]
                x = context.ops.layer_norm_attention(
                    x, *_params(own["ln_1"], attn, "c_attn"), n_head=attn.__dict__["n_head"],
                    dropout_p=context.dropout_p, seed=context.seed, stream=self.stream,
                )  # fmt: skip
            else:
                x = self._called_attention(self._attend(x.dtype, context), x)
        return self.feed_forward(x, context)

    def forward_with(self, attend: Attend, x: Tensor, context: ForwardContext) -> Tensor:
        """`forward` with `attend` for attention, as where keys of earlier tokens are kept."""
        if "attn" in self._modules:
            if context.fuses(self.oddity(self.attention_layers())):
                *qkv, proj_w, proj_b = _params(self.ln_1, self.attn, "c_attn")
                y = attend(context.ops.layer_norm_linear(x, *qkv), self.attn.n_head)
                x = context.ops.linear_residual(y, proj_w, proj_b, x)
            else:
                x = self._called_attention(attend, x)
        return self.feed_forward(x, context)

    def feed_forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The second half, (B, T, C) -> (B, T, C)."""
        if context.fuses(self.oddity(self.feed_forward_layers())):
            own: Any = self._modules
            mlp = own["mlp"]
            return context.ops.layer_norm_ffn(
                x, *_params(own["ln_2"], mlp, "c_fc"), gelu=mlp.__dict__["gelu"],
                dropout_p=context.dropout_p, seed=context.seed, stream=self.stream + 1,
            )  # fmt: skip
        wide = torch.promote_types(x.dtype, torch.float32)
        y = self.mlp(self.ln_2(x).to(x.dtype)).to(wide)
        return (x.to(wide) + context.dropped(y, self.stream + 1)).to(x.dtype)

    def attention_layers(self) -> Iterator[plain.Layer]:
        """The layers of the first half; those inside a foreign `attn` are not reached."""
        own: Any = self._modules  # three times as quick as nn.Module's attributes
        yield "ln_1", own["ln_1"], plain.norm
        yield "attn", own["attn"], _is_attention
        own = own["attn"]._modules
        yield "attn.c_attn", own["c_attn"], plain.linear
        yield "attn.c_proj", own["c_proj"], plain.linear

    def feed_forward_layers(self) -> Iterator[plain.Layer]:
        """The layers of the second half; those inside a foreign `mlp` are not reached."""
        own: Any = self._modules
        yield "ln_2", own["ln_2"], plain.norm
        yield "mlp", own["mlp"], _is_mlp
        own = own["mlp"]._modules
        yield "mlp.c_fc", own["c_fc"], plain.linear
        yield "mlp.c_proj", own["c_proj"], plain.linear

    def layers(self) -> Iterator[plain.Layer]:
        """All that the kernels must find plain."""
        if "attn" in self._modules:
            yield from self.attention_layers()
        yield from self.feed_forward_layers()

    def oddity(self, layers: Iterator[plain.Layer]) -> str | None:
        """The first of these layers that is not plain, and what it is; None where all are."""
        found = plain.first_replaced(layers)
        return None if found is None else f"h.{self.layer}.{found}"

    def _attend(self, dtype: torch.dtype, context: ForwardContext) -> Attend:
        def attention(*qkv: Tensor) -> Tensor:
            return context.ops.causal_attention(
                *qkv, dropout_p=context.dropout_p, seed=context.seed, stream=self.stream
            )

        # A layer of the user's may give another dtype than the residual stream has.
        return lambda qkv, n_head: packed_attention(attention, qkv.to(dtype), n_head)

    def _called_attention(self, attend: Attend, x: Tensor) -> Tensor:
        y = self.ln_1(x).to(x.dtype)
        if any(isinstance(module, CausalSelfAttention) for module in self.attn.modules()):
            return (x + self.attn(y, attend=attend)).to(x.dtype)
        return (x + self.attn(y)).to(x.dtype)
