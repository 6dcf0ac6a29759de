"""The operators' FLOP formulas for `torch.utils.flop_counter`: the reference's matrix products.

A formula receives an operator's arguments, with shapes in place of tensors. A multiply-add counts
as two FLOPs. Masked scores of attention count too, as in torch's own formulas.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

Shape = tuple[int, ...]
MODULE = "torch.utils.flop_counter"
FORMULAS: dict[str, Callable[..., int]] = {}


def of_product(x: Shape, weight: Shape) -> int:
    """FLOPs of x W'."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def of_product_backward(x: Shape, weight: Shape, wants_input: int, wants_weight: int) -> int:
    """FLOPs of the gradients of x W' for x and for W, for those that are wanted."""
    return of_product(x, weight) * (bool(wants_input) + bool(wants_weight))


def of_attention(q: Shape, k: Shape) -> int:
    """FLOPs of q k' and of the weights' product with v; q (B, H, Tq, D), k (B, H, Tk, D)."""
    return 4 * math.prod(q) * k[2]


def register() -> None:
    """Registers the formulas with torch's counter, now or when its module is imported.

    Importing that module here would import Triton too, which the package does not need on a CPU.
    """
    if MODULE in sys.modules:
        _add_to(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _add_to(module: Any) -> None:
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.gptfast, name)
        module.register_flop_formula(operator)(
            lambda *args, formula=formula, out_shape=None, **_: formula(*args)
        )


class _WhenImported(importlib.abc.MetaPathFinder):
    """Import hook: adds the formulas to torch's counter after its normal import."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # find_spec does not always lead to an import
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _add_to(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec
