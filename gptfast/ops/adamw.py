"""Clipping and AdamW over all parameters in one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.library import define


def _fake(weights: Sequence[Tensor], *_: Any) -> Tensor:
    return weights[0].new_empty(()) if weights else torch.empty(())


# Scales the gradients (as it reads them; they stay as they are) to a norm of at most `clip` over
# all of them, then moves weights, running means and counts of steps as torch.optim.AdamW does.
# All are contiguous float32. Returns the norm before, () float32.
adamw_ = define(
    """
    adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares,
        Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay,
        float clip) -> Tensor
    """,
    _fake,
)
