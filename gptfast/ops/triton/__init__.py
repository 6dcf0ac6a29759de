"""The operators' Triton kernels for CUDA and ROCm; importing this package registers them.

gptfast.ops.select imports it when an operator is first used on such a device.
"""

from typing import Any

import torch

from gptfast.ops import library
from gptfast.ops.triton import (
    adamw,
    attention,
    attention_backward,
    cross_entropy,
    embedding,
    ffn,
    linear,
    self_attention,
)
from gptfast.ops.triton.plans import planned

KERNELS: dict[str, Any] = {
    "attention": attention.attention,
    "attention_backward": attention_backward.attention_backward,
    "self_attention": self_attention.self_attention,
    "self_attention_backward": self_attention.self_attention_backward,
    "linear": linear.linear,
    "linear_backward": linear.linear_backward,
    "ffn": ffn.ffn,
    "ffn_backward": ffn.ffn_backward,
    "linear_cross_entropy": cross_entropy.linear_cross_entropy,
    "embedding": embedding.embedding,
    "embedding_backward": embedding.embedding_backward,
    "adamw_": adamw.adamw_,
}


def update(params: Any, *args: Any) -> Any:
    """gptfast::adamw_ on the device of the parameters."""
    with torch.cuda.device_of(params[0]):
        return adamw.adamw_(params, *args)


for name, kernel in KERNELS.items():
    library.KERNELS[name, True] = call = update if name == "adamw_" else planned(kernel, KERNELS)
    library.LIBRARY.impl(name, call, "CUDA")
for name, function in library.PUBLIC.items():
    library.INSTEAD[name, True] = planned(function, KERNELS)
