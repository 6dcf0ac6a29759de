"""Draws the initial weights from a given random generator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class InitialDraws(TorchFunctionMode):
    """Makes the initialisers of torch.nn draw from a generator, in this thread.

    Args:
        generator: the source of the random numbers. None skips the initialisation, for a model
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
