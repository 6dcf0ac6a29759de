"""Gradient clipping and AdamW over all parameters in one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.library import define


def _fake(weights: Sequence[Tensor], *_: Any) -> Tensor:
    return weights[0].new_empty(()) if weights else torch.empty(())


# Scales the gradients to a joint norm of at most `clip` as it reads them, without changing them in
# memory, and updates weights, moments and step counts in place as torch.optim.AdamW does. All
# tensors are contiguous float32. Returns the norm before clipping, () float32.
adamw_ = define(
    """
    adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares,
        Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay,
        float clip) -> Tensor
    """,
    _fake,
)
