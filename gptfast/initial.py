"""The initial weights, drawn from a given random generator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from gptfast.model import GPT


class InitialDraws(TorchFunctionMode):
    """Makes the initialisers of torch.nn draw from a generator, in this thread.

    Args:
        generator: The source of the random numbers. None skips the initialisation, for a model
            whose weights are replaced afterwards or that is on the meta device (where torch would
            spend seconds loading its compiler).
    """

    DRAWING = frozenset({
        nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, nn.init.xavier_uniform_,
        Tensor.normal_, Tensor.uniform_,
    })  # fmt: skip

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.DRAWING:
            return func(*args, **kwargs)
        if self.generator is None:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs | {"generator": self.generator})


def init_torch(model: "GPT") -> None:
    """Initialises as nn.Embedding, nn.MultiheadAttention and nn.Linear do themselves."""
    for block in model.blocks if model.config.attention else ():
        nn.init.xavier_uniform_(block.attn.c_attn.weight)
        for linear in (block.attn.c_attn, block.attn.c_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def init_gpt2(model: "GPT") -> None:
    """Draws N(0, 0.02); residual projections 1 / sqrt(2 L) of that (Radford et al., 2019)."""
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(param)
        elif param.dim() == 2:
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(
                param, std=0.02 / (2 * model.config.n_layer) ** 0.5 if residual else 0.02
            )
    if model.config.padding_idx is not None:
        nn.init.zeros_(model.wte.weight.data[model.config.padding_idx])
