"""The operators' Triton kernels for CUDA and ROCm; importing this package registers them.

gptfast.ops.select imports it when an operator is first used on such a device.
"""

import functools
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


def on_device(kernel: Any) -> Any:
    """Wraps a kernel's launcher: it runs on the device of its first argument, or of its first."""

    @functools.wraps(kernel)
    def launch(first: Any, *args: Any) -> Any:
        x = first[0] if isinstance(first, list) else first
        if x.get_device() == torch.cuda.current_device():
            return kernel(first, *args)
        with torch.cuda.device_of(x):
            return kernel(first, *args)

    return launch


for name, kernel in KERNELS.items():
    library.KERNELS[name, "cuda"] = launcher = on_device(kernel)
    library.LIBRARY.impl(name, launcher, "CUDA")
