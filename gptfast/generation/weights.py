"""The weights that a decoder computes with: the model's own, or copies in another dtype."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast import plain
from gptfast.generation.snapshot import rounded_to_int8
from gptfast.model import GPT

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}

Norm = tuple[Tensor, Tensor | None]
Linear = tuple[Tensor, Tensor | None]


class Layer(NamedTuple):
    """A block's weights; the first three are None in a model without attention."""

    ln_1: Norm | None
    qkv: Linear | None
    proj: Linear | None
    ln_2: Norm
    fc: Linear
    fc_proj: Linear


class Weights:
    """The weights of a model, by name.

    Where the model has the dtype and does not change during a call, they are its own tensors, which
    are let go between calls. Else they are copies, which each call makes anew in the same place:
    a change through `Parameter.data` leaves no trace that could be looked for.
    """

    def __init__(self, model: GPT, dtype: str | None, lasting: bool) -> None:
        """Copies what has to be copied.

        Args:
            model: The GPT, of plain layers.
            dtype: As for `generate`.
            lasting: Whether the model may change before the call is done.
        """
        self.dtype = model.wte.weight.dtype if dtype is None else FLOATS[dtype]
        self._int8 = dtype == "int8"
        given = parameters_of(model)
        self._copied = lasting or self._int8 or not all(map(self._usable, given.values()))
        self._n_layer = len(model.h)
        self._places = {name: _place(weight) for name, weight in given.items()}
        self._tensors: dict[str, Tensor] = {}
        if self._copied:
            self._tensors = {
                name: torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
                for name, weight in given.items()
            }
        self.take(given)

    @property
    def bytes(self) -> int:
        """How many bytes the copies take."""
        return sum(each.nbytes for each in self._tensors.values()) if self._copied else 0

    def fits(self, given: dict[str, Tensor]) -> bool:
        """Whether `take` would fill the same memory, or find the weights where they were."""
        if not self._copied:
            return self._places == {name: _place(weight) for name, weight in given.items()}
        own = {name: (each.shape, each.device) for name, each in self._tensors.items()}
        return own == {name: (each.shape, each.device) for name, each in given.items()}

    @torch.no_grad()
    def take(self, given: dict[str, Tensor]) -> None:
        """Takes a model's weights as they are now, see `parameters_of`."""
        if not self._copied:
            self._tensors = given
        elif self._int8:
            for name, weight in given.items():
                matrix = weight.dim() == 2 and not name.startswith(("wte", "wpe"))
                value = rounded_to_int8(weight.float()) if matrix else weight
                self._tensors[name].copy_(value)
        else:
            torch._foreach_copy_(list(self._tensors.values()), list(given.values()))

    def let_go(self) -> None:
        """Lets the model's own tensors go."""
        if not self._copied:
            self._tensors = {}

    @property
    def wte(self) -> Tensor:
        """Token embedding, (V, C)."""
        return self._tensors["wte.weight"]

    @property
    def wpe(self) -> Tensor:
        """Position embedding, (block_size, C)."""
        return self._tensors["wpe.weight"]

    @property
    def head(self) -> tuple[Norm, Tensor]:
        """The final norm and the head's weight, (V, C)."""
        return self._pair("ln_f"), self._tensors["lm_head.weight"]

    @property
    def layers(self) -> list[Layer]:
        """The blocks' weights."""
        return [self._layer(f"h.{i}.") for i in range(self._n_layer)]

    def _layer(self, at: str) -> Layer:
        attention: Any = None, None, None
        if at + "attn.c_attn.weight" in self._tensors:
            attention = map(self._pair, (at + "ln_1", at + "attn.c_attn", at + "attn.c_proj"))
        rest = map(self._pair, (at + "ln_2", at + "mlp.c_fc", at + "mlp.c_proj"))
        return Layer(*attention, *rest)

    def _pair(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self._tensors[name + ".weight"], self._tensors.get(name + ".bias")

    def _usable(self, weight: Tensor) -> bool:
        return weight.dtype == self.dtype and weight.is_contiguous()


def parameters_of(model: GPT) -> dict[str, Tensor]:
    """Returns the parameters of a model of plain layers by name.

    In half of the time that named_parameters takes, which looks for them everywhere.
    """
    layers = plain.layers_of(model, plain.called, plain.called)
    return {
        f"{name}.{own}": param
        for name, module, _ in layers
        for own, param in module.__dict__["_parameters"].items()
        if param is not None
    }


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), weight.device
