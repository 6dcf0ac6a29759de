"""A model as it is now, in the dtype of a call: what the loops in plain torch compute with."""

import copy
from typing import Any

import torch
from torch import Tensor

from gptfast.errors import ConfigError
from gptfast.generation.dtypes import FLOATS
from gptfast.generation.supported import unsupported_part
from gptfast.model import GPT
from gptfast.ops.int8 import rounded


def snapshot(model: GPT, dtype: str | None) -> GPT:
    """Copies a model, in evaluation mode.

    Args:
        model: The GPT; later changes of it do not reach the copy, apart from its hooks.
        dtype: "fp32" or "bf16"; "int8" for float32 with the weights rounded to 8 bits; the model's
            own when None.

    Raises:
        ConfigError: The dtype is "int8" and the model has layers that are not plain.
    """
    unsupported = unsupported_part(model) if dtype == "int8" else None
    if unsupported is not None:
        raise ConfigError(f"dtype='int8' rounds the weights of plain layers, and {unsupported}")
    copied = _deep_copy(model).eval()
    if dtype == "int8":
        copied = copied.float()
        for name, param in copied.named_parameters():
            if has_int8(name, param):
                param.data = rounded(param.data).dense(torch.float32)
        if model.config.tie_weights:  # the head is rounded, the embedding is not
            head = rounded(copied.wte.weight.data).dense(torch.float32)
            copied.lm_head.weight = torch.nn.Parameter(head)
    elif dtype is not None:
        copied = copied.to(FLOATS[dtype])
    return copied


def _deep_copy(model: GPT) -> GPT:
    """A deep copy that shares the hooks: the user would not see what a copied hook writes."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith(("_forward_hooks", "_pre_hooks", "_backward_hooks")):
                shared |= {id(hook): hook for hook in value.values()}
            # weight_norm and prune compute a weight, and torch does not copy computed tensors.
            elif isinstance(value, Tensor) and not value.is_leaf:
                shared[id(value)] = value.detach().clone()
    return copy.deepcopy(model, shared)


def has_int8(name: str, param: Tensor) -> bool:
    """Whether dtype="int8" rounds a parameter: the weights of linear layers, and no embedding."""
    return param.dim() == 2 and not name.startswith(("wte", "wpe"))
