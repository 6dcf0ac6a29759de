"""The library that the operators' schemas are defined in, and their kernels registered in."""

from collections.abc import Callable
from typing import Any

import torch

from gptfast.ops import flops as formulas
from gptfast.ops.autograd import one_by_one

LIBRARY = torch.library.Library("gptfast", "DEF")


def define(schema: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None) -> Any:
    """Defines gptfast::<schema>; returns the operator.

    Kernels are added elsewhere: by the compiled extension for the CPU, by gptfast.ops.triton for
    CUDA.

    Args:
        schema: In torch's notation.
        fake: Makes results of the right shapes and dtypes.
        flops: The operator's formula, see gptfast.ops.flops.
    """
    name = schema.partition("(")[0].strip()
    LIBRARY.define(" ".join(schema.split()))
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.gptfast, name).default
    torch.library.register_vmap(f"gptfast::{name}", one_by_one(operator), lib=LIBRARY)
    if flops is not None:
        formulas.FORMULAS[name] = flops
    return operator
