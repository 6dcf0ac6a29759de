"""The model whose weights are the running means of the trained ones."""

import copy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def with_weights(model: Module, params: list[nn.Parameter], values: list[Tensor]) -> Module:
    """Returns a copy of a model in evaluation mode, with other weights in place of `params`.

    All tensors are shared, none is copied: the copy shows what is later written to `values`, and
    has the parameters of the model that are not in `params`.
    """
    shared: dict[int, Tensor] = {id(each): each for each in [*model.parameters(), *model.buffers()]}
    for param, value in zip(params, values, strict=True):
        shared[id(param)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(model, dict(shared)).eval()
