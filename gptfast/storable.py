"""Selects what a checkpoint stores of a model, and checks that this describes the whole model.

A checkpoint holds a configuration and tensors, and is loaded as the GPT that they describe. A model
that computes something else (LoRA layers, parametrizations, another eps) would load as a different
model, so it is rejected. Hooks are neither stored nor rejected: most of them only observe.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.checks import dtype_name
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError
from gptfast.initial import InitialDraws
from gptfast.integrity import reading
from gptfast.model import EMBEDDING, GPT, HEAD
from gptfast.plain import overridden

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def empty(config: GPTConfig) -> GPT:
    """Makes a GPT on the meta device: its tensors have no storage. Draws no random numbers."""
    with torch.device("meta"), InitialDraws(None):
        return GPT(config)


def assembled(config: GPTConfig, tensors: dict[str, Tensor], source: str | Path) -> GPT:
    """Makes the GPT of a configuration around tensors that were read, without other weights.

    Args:
        config: The shape.
        tensors: All parameters by their names here, which the model keeps, with their dtypes. A
            tied head may be missing.
        source: Where they come from, for the error.

    Raises:
        CheckpointError: The tensors do not fit the configuration.
    """
    model = skeleton(config, tensors, source)
    if config.tie_weights and EMBEDDING in tensors:
        tensors = tensors | {HEAD: tensors[EMBEDDING]}
    check_fit(tensors, model.state_dict(), source)
    model.load_state_dict(tensors, assign=True)  # which keeps each tensor's dtype
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model


def skeleton(config: GPTConfig, tensors: Mapping[str, Tensor], source: str | Path) -> GPT:
    """Makes the `empty` GPT of a configuration that these tensors may fit; see `assembled`."""
    # More layers than tensors cannot be right, and a wrong number could be built for hours.
    layers = min(config.n_layer, len(tensors) + 1)
    with reading(Path(source)):  # sizes beyond what torch can count
        return empty(replace(config, n_layer=layers))


def check_fit(found: dict[str, Tensor], expected: dict[str, Tensor], source: str | Path) -> None:
    """Raises CheckpointError for what `mismatch` finds."""
    problem = mismatch(found, expected)
    if problem:
        raise CheckpointError(f"{source}: does not fit its configuration: {problem}")


def stored_config(model: GPT) -> GPTConfig:
    """Returns the model's configuration, with `tie_weights` as the weights are now.

    The user can tie or untie them by assignment or by `load_state_dict(assign=True)`.
    """
    head, embedding = model.lm_head.weight, model.wte.weight
    tied = head is embedding or (
        head.data_ptr() == embedding.data_ptr() != 0  # parts of weights have the address 0
        and (head.dtype, head.shape, head.stride())
        == (embedding.dtype, embedding.shape, embedding.stride())
    )
    return replace(model.config, tie_weights=tied)


def stored_tensors(model: GPT) -> dict[str, Tensor]:
    """Returns the model's tensors on the CPU, detached, unshared, and without a tied head."""
    tied = stored_config(model).tie_weights
    tensors = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tied and name == HEAD:
            continue
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach().cpu().contiguous()
        # Weights that the user shares between layers are stored once per layer.
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


def with_all_biases(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Adds zeros for the biases that a model lacks, as formats need which always have them.

    Args:
        tensors: What `stored_tensors` gives.
        config: The model's.
    """
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if not config.bias and name not in (EMBEDDING, HEAD, "wpe.weight"):
            found[f"{name.removesuffix('weight')}bias"] = tensor.new_zeros(len(tensor))
    return found


def check_storable(model: GPT) -> None:
    """Checks that a checkpoint of the model would load as the same model.

    Raises:
        CheckpointError: It would not; names the module or tensor that differs.
    """
    plain = empty(model.config)
    problem = _foreign_module(model, plain) or mismatch(model.state_dict(), plain.state_dict())
    if problem:
        raise CheckpointError(
            f"the model cannot be saved, it would load as another one: {problem}; "
            "merge or remove what was changed, or keep its state_dict by torch.save"
        )


def _foreign_module(model: GPT, plain: GPT) -> str | None:
    override = overridden(model, GPT)
    if override is not None:
        return override
    if "forward" in vars(model):
        return "it has a forward of its own"
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, expected in plain.named_modules():
        found = modules.get(name)
        if found is None:
            return f"it lacks {name}"
        if not name:
            continue
        if type(found) is not type(expected):
            return f"{name} is a {type(found).__name__}, expected a {type(expected).__name__}"
        if "forward" in vars(found):
            return f"{name} has a forward of its own"
        settings = _settings(found)
        for key, value in _settings(expected).items():
            if settings.get(key) != value:
                return f"{name} has {key}={settings.get(key)!r}, expected {value!r}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "training"
        and (value is None or isinstance(value, bool | int | float | str))
    }


def mismatch(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Returns how tensors differ from the expected names, shapes or kind, or None if they do not.

    Any dtype of DTYPES is accepted.
    """
    for names, problem in (
        (sorted(found.keys() - expected.keys()), "has unexpected"),
        (sorted(expected.keys() - found.keys()), "lacks"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"it {problem} {names[0]}{others}"
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            return f"{name} is a {type(tensor).__name__}, expected a tensor"
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            return f"{name} has shape {shape}, expected {wanted}"
        dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
        if not dense or tensor.dtype not in DTYPES:
            return (
                f"{name} is a {type(tensor).__name__} of {dtype_name(tensor.dtype)} on "
                f"{tensor.device}, expected a dense floating-point tensor"
            )
    return None
