"""GPT: a pre-norm transformer with learned positions, on the fused kernels or on plain torch.

Letters: B batch, T time, C n_embd, H heads, D head_dim, V vocab_size, L layers. Modules have
GPT-2's names.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptfast import heads, ops, plain, summary
from gptfast.checks import check_is
from gptfast.config import GPTConfig
from gptfast.errors import ConfigError
from gptfast.initial import InitialDraws, init_gpt2, init_torch
from gptfast.modules import Block, ForwardContext
from gptfast.ops import reference, select
from gptfast.ops.autograd import transformed
from gptfast.ops.random import seed_tensor

Backend = Literal["auto", "fused", "reference"]
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"  # two names of one weight if it is tied


class Intermediates(NamedTuple):
    """The intermediate results of a forward pass, for teaching and tests."""

    positions: Tensor  # (T,) int64
    mask: Tensor  # (T, T) bool, True where a query (row) attends to a key (column)
    hidden: Tensor  # (B, T, C) after the final norm
    logits: Tensor  # (B, T, V)


class GPT(nn.Module):
    """A GPT language model.

    `backend` chooses how it computes: "fused" uses the kernels and raises an error if they cannot
    run, "reference" uses plain torch, "auto" uses the kernels if they can run. Both take dropout
    masks from the same counters, so equal seeds of torch's default generator give equal results up
    to rounding. (torch.compile has a generator of its own, which gives other masks.)

    The kernels compute plain layers. If a layer is anything else (of another type, with hooks, a
    parametrisation, a forward or an eps of its own), "auto" and "reference" compute that part of
    the model by calling its modules, and "fused" refuses and names the module. Hooks on GPT and
    Block are always called and do not prevent the use of the kernels.

    Where `recompute` is set, the backward pass computes each block once more. In between, a block
    keeps its input alone, which saves memory and changes no result. (Inside a transform of
    torch.func it has no effect.)

    Args:
        config: The shape, with a vocabulary's size.
        backend: How it computes.
        generator: The source of the initial weights, which are made on its device. None stands for
            torch's default generator, which gives the same weights for the same seed.

    Raises:
        ConfigError: `config.vocab_size` is None, or `backend` is unknown.
    """

    recompute: bool = False

    def __init__(
        self,
        config: GPTConfig,
        backend: Backend = "auto",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_is("config", config, GPTConfig, "a GPTConfig")
        if config.vocab_size is None:
            raise ConfigError(
                "a GPT needs a number for vocab_size, got None: gptfast.train takes its text's"
            )
        self.config = config
        self.backend = backend
        with ExitStack() as drawn:
            if generator is not None:
                drawn.enter_context(generator.device)
                drawn.enter_context(InitialDraws(generator))
            self._make(config)

    def _make(self, config: GPTConfig) -> None:
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, padding_idx=config.padding_idx)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=reference.LAYER_NORM_EPS, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_torch(self) if config.init == "torch" else init_gpt2(self)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight

    @property
    def blocks(self) -> list[Block]:
        """The modules of `h`."""
        return [cast(Block, block) for block in self.h]

    @property
    def backend(self) -> Backend:
        """How the model computes: "auto", "fused" or "reference"."""
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        if backend not in ("auto", "fused", "reference"):
            raise ConfigError(f"backend must be 'auto', 'fused' or 'reference', got {backend!r}")
        self._backend: Backend = backend

    def forward(
        self,
        idx: Tensor,
        *,
        return_intermediates: bool = False,
        targets: Tensor | None = None,
        seed: int | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor | Intermediates:
        """Computes the logits of the token after each position.

        Args:
            idx: (B, T) int64, T at most block_size.
            return_intermediates: Also return positions, mask and final hidden states.
            targets: Compute `loss` instead, because wrappers such as DistributedDataParallel and
                torch.compile only follow this method.
            seed: See `loss`.
            label_smoothing: See `loss`.

        Returns:
            (B, T, V) in the activations' dtype, or Intermediates; () float32 with `targets`.
        """
        if targets is not None:
            return self.loss(idx, targets, seed=seed, label_smoothing=label_smoothing)
        x, context = self._trunk(idx, seed)
        if context.fuses(plain.first_replaced(self.head_layers())):
            logits = context.ops.layer_norm_linear(
                x, self.ln_f.weight, self.ln_f.bias, self.lm_head.weight, None
            )
            hidden = self._final_norm(x) if return_intermediates else x
        else:
            hidden = self.ln_f(x).to(x.dtype)
            logits = self.lm_head(hidden)
        if not return_intermediates:
            return logits
        T = idx.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
        return Intermediates(torch.arange(T, device=idx.device), mask, hidden, logits)

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        seed: int | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Computes the mean cross-entropy of `targets` in nats, by blocks of logits.

        Where `lm_head` is no plain layer it is called, and all logits are in memory at once.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64, the token after each position; `ignore_index` counts for nothing.
            ignore_index: See targets.
            seed: The key of the dropout masks; None draws one from torch's default generator. A
                model that does not drop out takes none.
            label_smoothing: The part of the target's probability that all tokens share, in [0, 1).

        Returns:
            () float32.
        """
        x, context = self._trunk(idx, seed)
        head, norm = self.lm_head, {}
        if context.fuses(plain.first_replaced(self.head_layers())):
            norm = {"ln_w": self.ln_f.weight, "ln_b": self.ln_f.bias}
        else:
            x = self.ln_f(x).to(x.dtype)
        if plain.head(head) is None:
            return context.ops.linear_cross_entropy(
                x, head.weight, targets, ignore_index=ignore_index,
                label_smoothing=label_smoothing, **norm,
            )  # fmt: skip
        logits = head(x).flatten(0, 1)  # (B T, V)
        reference.check_targets("loss", targets, ignore_index, logits.shape[-1])
        total = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            targets.flatten(),
            ignore_index=ignore_index,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        return total / (targets != ignore_index).sum().clamp(min=1)

    def attention_weights(self, idx: Tensor) -> Tensor:
        """Computes the attention weights of every layer, without dropout, by the reference.

        Args:
            idx: (B, T) int64.

        Returns:
            (L, B, H, T, T); rows sum to 1.

        Raises:
            ConfigError: The model has no attention, or one of the user's own.
        """
        return heads.attention_weights(self, idx)

    def attention_contributions(self, idx: Tensor) -> Tensor:
        """Computes what each head adds to the residual stream, without dropout, by the reference.

        With x the block's input after its LayerNorm and w the attention weights, head h adds at
        position i the sum over j of w_ij (x_j U_V(h) + b_V(h)) U_O(h), where U_V and b_V are its
        part of c_attn, and U_O its part of c_proj. The sum over h, with c_proj's bias, is the
        attention's output. Modules of the user's own are called with each head alone.

        Args:
            idx: (B, T) int64.

        Returns:
            (L, B, H, T, C), float32 or the activations' wider dtype.

        Raises:
            ConfigError: As for `attention_weights`; or a module in place of c_proj is not linear.
        """
        return heads.attention_terms(self, idx).heads

    def _trunk(self, idx: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ForwardContext]:
        """The blocks' output, (B, T, C), before the final norm."""
        self.check_idx(idx)
        dropout_p = self.config.dropout if self.training else 0.0
        # Drawn on the CPU, so that masks are the same on every device and we need not wait for it.
        key = seed_tensor(seed).to(idx.device, non_blocking=True) if dropout_p > 0.0 else None
        context = ForwardContext(
            self._ops(),
            dropout_p,
            key,
            strict=self.backend == "fused",
            recompute=self.recompute and torch.is_grad_enabled() and not transformed(),
        )
        x = self.embed(idx, context)
        for block in self.blocks:
            x = block(x, context)
        return x, context

    def check_idx(self, idx: Tensor) -> None:
        """Raises ValueError unless `idx` is (B, T) int64 with T at most block_size."""
        if idx.dim() != 2 or idx.dtype != torch.int64:
            raise ValueError(
                f"idx must be a (B, T) int64 tensor, got {tuple(idx.shape)} of {idx.dtype}"
            )
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"idx must have at most block_size={self.config.block_size} positions, got"
                f" {idx.shape[1]}"
            )

    @property
    def main_weight(self) -> Tensor:
        """The tensor whose dtype and device are the model's: the token embedding's, if it has any.

        What a user put in its place need not have a `weight`.
        """
        weight = getattr(self.wte, "weight", None)
        return weight if isinstance(weight, Tensor) else next(self.parameters())

    def _dtype(self) -> torch.dtype:
        """The activations' dtype: autocast's where that is on, else the weights'."""
        weight = self.main_weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    @property
    def computes_by(self) -> str:
        """What computes plain layers as the model is now: "kernels" or "plain torch"."""
        return "kernels" if self._ops() is ops else "plain torch"

    def _ops(self) -> ModuleType:
        if self.backend == "auto":
            device, head_dim = self.main_weight.device.type, self.config.head_dim
            return reference if select.unavailable(device, self._dtype(), head_dim) else ops
        return ops if self.backend == "fused" else reference

    def embed(self, idx: Tensor, context: ForwardContext) -> Tensor:
        """Token and position embedding, (B, T, C)."""
        if context.fuses(plain.first_replaced(self.embedding_layers())):
            return context.ops.embedding(
                idx,
                self.wte.weight,
                self.wpe.weight,
                padding_idx=self.wte.padding_idx,
                dropout_p=context.dropout_p,
                seed=context.seed,
                dtype=self._dtype(),
            )
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        return context.dropped(x.to(torch.promote_types(x.dtype, torch.float32)), 0).to(
            self._dtype()
        )

    def embedding_layers(self) -> Iterator[plain.Layer]:
        """The layers that `embed` computes."""
        own: Any = self._modules
        yield "wte", own["wte"], plain.embedding
        yield "wpe", own["wpe"], plain.positions

    def head_layers(self) -> Iterator[plain.Layer]:
        """The layers after the blocks."""
        own: Any = self._modules
        yield "ln_f", own["ln_f"], plain.norm
        yield "lm_head", own["lm_head"], plain.head

    def _repr_html_(self) -> str:
        """What a notebook shows: shape, parameters by part, dtype, device and backend."""
        return summary.as_html(self)

    def _final_norm(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.ln_f.bias is None else self.ln_f.bias.to(x.dtype)
            return F.layer_norm(
                x, x.shape[-1:], self.ln_f.weight.to(x.dtype), bias, reference.LAYER_NORM_EPS
            )


def unwrapped(model: nn.Module) -> GPT:
    """The GPT inside `torch.compile` and (Distributed)DataParallel, nested in any order.

    Raises:
        ConfigError: There is none.
    """
    inner = model
    while not isinstance(inner, GPT):
        # By its name: importing torch's compiler to ask for the class takes seconds.
        if type(inner).__name__ == "OptimizedModule":
            inner = cast(nn.Module, inner._orig_mod)
        elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        else:
            within = "" if inner is model else f" around a {type(inner).__name__}"
            raise ConfigError(
                "expected a GPT, alone or within torch.compile or DistributedDataParallel, "
                f"got a {type(model).__name__}{within}"
            )
    return inner
