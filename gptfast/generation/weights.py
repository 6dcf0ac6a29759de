"""The weights that a decoder computes with: the model's own, or copies in other dtypes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast import plain
from gptfast.generation.dtypes import activations
from gptfast.generation.snapshot import has_int8
from gptfast.model import EMBEDDING, GPT, HEAD
from gptfast.modules import Block
from gptfast.ops.int8 import Int8Weight, empty_int8
from gptfast.ops.triton.int8 import round_to_int8

Norm = tuple[Tensor, Tensor | None]
Linear = tuple[Tensor | Int8Weight, Tensor | None]


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

    Those in the dtype of the call are the model's own tensors if the model does not change during
    it; we release them between calls. Others are copies, which each call makes anew in the same
    memory, because a change through `Parameter.data` leaves no trace to detect.

    With 8 bits the weights of linear layers are copies. All other weights stay exact: the kernels
    take the model's own in the dtype of the activations or float32.
    """

    def __init__(self, model: GPT, dtype: str | None, lasting: bool) -> None:
        """Copies what has to be copied.

        Args:
            model: The GPT, of plain layers.
            dtype: As for `generate`.
            lasting: Whether the model may change before the call is done.
        """
        own = model.wte.weight
        self.dtype = activations(own.dtype, dtype, own.device.type)
        self._n_layer = len(model.h)
        self._copies: dict[str, Any] = {}  # tensors and 8-bit weights
        self._named: dict[str, Any] = {}
        given = parameters_of(model)
        self._tied = _is_tied(given)
        for name, weight in given.items():
            if dtype == "int8" and has_int8(name, weight):
                self._copies[name] = empty_int8(weight)
                continue
            if name == HEAD and self._tied:
                continue
            exact = dtype == "int8" and weight.dtype != self.dtype
            kind = torch.float32 if exact else self.dtype
            if lasting or weight.dtype != kind or not weight.is_contiguous():
                self._copies[name] = torch.empty(weight.shape, dtype=kind, device=weight.device)
        self._needed = self._needs(given)
        self.take(given)

    @property
    def bytes(self) -> int:
        """How many bytes the copies take."""
        return sum(each.nbytes for each in self._copies.values())

    def fits(self, given: dict[str, Tensor]) -> bool:
        """Whether `take` would fill the same memory, and other weights have not moved."""
        return _is_tied(given) == self._tied and self._needs(given) == self._needed

    def _needs(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """What a decoder that refers to these weights depends on."""
        return {
            name: (weight.dtype, weight.shape, weight.device)
            + (() if name in self._copies else (weight.data_ptr(), weight.stride()))
            for name, weight in given.items()
            if not (self._tied and name == HEAD)
        }

    @torch.no_grad()
    def take(self, given: dict[str, Tensor]) -> None:
        """Takes a model's weights as they are now, see `parameters_of`."""
        copies, originals = [], []
        for name, copy in self._copies.items():
            if isinstance(copy, Int8Weight):
                round_to_int8(given[name], copy)
            else:
                copies.append(copy)
                originals.append(given[name])
        if copies:
            torch._foreach_copy_(copies, originals)
        self._named = given | self._copies
        if self._tied and HEAD not in self._copies:
            self._named[HEAD] = self._named[EMBEDDING]

    def let_go(self) -> None:
        """Releases the model's own tensors."""
        self._named = {}

    @property
    def wte(self) -> Tensor:
        """Token embedding, (V, C)."""
        found: Tensor = self._named[EMBEDDING]
        return found

    @property
    def wpe(self) -> Tensor:
        """Position embedding, (block_size, C)."""
        found: Tensor = self._named["wpe.weight"]
        return found

    @property
    def head(self) -> tuple[Norm, Tensor | Int8Weight]:
        """The final norm and the head's weight, (V, C)."""
        return self._pair("ln_f"), self._named[HEAD]

    @property
    def layers(self) -> list[Layer]:
        """The blocks' weights."""
        return [self._layer(f"h.{i}.") for i in range(self._n_layer)]

    def _layer(self, at: str) -> Layer:
        attention: Any = None, None, None
        if at + "attn.c_attn.weight" in self._named:
            attention = map(self._pair, (at + "ln_1", at + "attn.c_attn", at + "attn.c_proj"))
        rest = map(self._pair, (at + "ln_2", at + "mlp.c_fc", at + "mlp.c_proj"))
        return Layer(*attention, *rest)

    def _pair(self, name: str) -> Any:
        return self._named[name + ".weight"], self._named.get(name + ".bias")


def parameters_of(model: GPT) -> dict[str, Tensor]:
    """Returns the parameters of a model of plain layers by name.

    It takes half the time of named_parameters, which searches every module.
    """
    layers = plain.layers_of(model, plain.bypassable, plain.bypassable)
    return {
        f"{name}.{kind}": param
        for name, module, _ in layers
        if not isinstance(module, GPT | Block)
        for kind in ("weight", "bias")
        if (param := plain.parameter(module, kind)) is not None
    }


def _is_tied(given: dict[str, Tensor]) -> bool:
    return given[HEAD] is given[EMBEDDING]
