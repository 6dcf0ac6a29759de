"""The torch library in which the operators are defined and their kernels registered."""

from collections.abc import Callable
from typing import Any

import torch

from gptfast.ops import flops as formulas
from gptfast.ops.autograd import vmap_in_a_loop

LIBRARY = torch.library.Library("gptfast", "DEF")


def define(schema: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None) -> Any:
    """Defines the operator gptfast::<schema> and returns it.

    Kernels are registered elsewhere: for the CPU by the compiled extension, for CUDA by
    gptfast.ops.triton.

    Args:
        schema: The schema in torch's notation.
        fake: A function that returns results of the right shapes and dtypes, without computing.
        flops: The operator's FLOP formula; see gptfast.ops.flops.
    """
    name = schema.partition("(")[0].strip()
    LIBRARY.define(" ".join(schema.split()))
    torch.library.register_fake(f"gptfast::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.gptfast, name).default
    torch.library.register_vmap(f"gptfast::{name}", vmap_in_a_loop(operator), lib=LIBRARY)
    if flops is not None:
        formulas.FORMULAS[name] = flops
    return operator
