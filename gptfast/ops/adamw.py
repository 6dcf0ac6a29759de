"""Gradient clipping, AdamW and running means of the weights, over all parameters at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.library import define

OPTIONS = 6  # numbers of the operator that all parameters share: lr, beta1, beta2, eps, clip, ema


def _fake(weights: Sequence[Tensor], *_: Any) -> Tensor:
    return weights[0].new_empty(()) if weights else torch.empty(())


# Scales the gradients to a joint norm of at most `clip` as it reads them, without changing them in
# memory, and updates weights, moments and step counts in place as torch.optim.AdamW does. Averages,
# of which there may be none, become ema_t average + (1 - ema_t) weight by the new weight, with
# ema_t = min(ema, (1 + t) / (10 + t)) in step t, so that the first weights are soon forgotten. All
# tensors are contiguous float32; each weight has its own decay. Returns the norm before clipping,
# () float32.
adamw_ = define(
    """
    adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares,
        Tensor(d!)[] steps, Tensor(e!)[] averages, float[] weight_decay, float lr, float beta1,
        float beta2, float eps, float clip, float ema) -> Tensor
    """,
    _fake,
)
