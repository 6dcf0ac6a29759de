"""The names of dtypes in generation, and the dtype of a call's activations."""

import torch

from gptfast.ops import select

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def activations(own: torch.dtype, dtype: str | None, device: str) -> torch.dtype:
    """Returns the dtype of activations and caches.

    Args:
        own: The dtype of the model's weights.
        dtype: As for `generate`. With "int8" it is bfloat16, which has integers of 8 bits exactly,
            where the device multiplies it, else float32.
        device: The type of the model's device.
    """
    if dtype is None:
        return own
    if dtype == "int8":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    return FLOATS[dtype]


def multiplies_bf16(device: str) -> bool:
    """Whether the kernels for a device multiply bfloat16 faster than float32."""
    if device != "cpu":
        return True
    extension = select.extension()
    return extension is not None and extension.isa_current() in ("avx512_bf16", "amx")
