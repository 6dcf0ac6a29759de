"""The compiled engine in Python: a model packed for it, and the loop that runs it."""

import warnings
from dataclasses import astuple
from typing import Any

import torch

from gptfast.checks import kind_of
from gptfast.errors import BackendError, ConfigError
from gptfast.generation.dtypes import FLOATS, activations
from gptfast.generation.request import (
    DTYPES,
    MAX_BATCH,
    Request,
    check_dtype,
    not_finite,
    slots_at_once,
)
from gptfast.generation.sequences import Update
from gptfast.generation.supported import unsupported_part
from gptfast.model import GPT, unwrapped
from gptfast.modules import not_fused
from gptfast.ops import select


def pack(model: GPT, dtype: str | None = None) -> "PackedModel":
    """Packs a model's weights once for many calls of `generate`, `stream` and `score`.

    Args:
        model: The GPT; its later changes do not reach the packed model.
        dtype: As for `generate`, whose calls with the packed model then take no other.

    Raises:
        ConfigError: `dtype` is unknown, or `model` no GPT or packed already.
        BackendError: The kernels cannot run, the model's backend is "reference", or one of its
            modules is no plain layer.
    """
    check_dtype(dtype)
    if isinstance(model, PackedModel):
        raise ConfigError("pack: the model is packed already")
    model = unwrapped(model)
    if model.backend == "reference":
        raise BackendError("pack: the model's backend is 'reference', which packs nothing")
    device = model.main_weight.device.type
    if device != "cpu":
        raise BackendError(f"pack: the compiled engine is for the CPU, the model is on {device!r}")
    chosen = activations(model.main_weight.dtype, dtype, device)
    select.require_fused("pack", device, chosen, "an unpacked model")
    unsupported = unsupported_part(model)
    if unsupported is not None:
        raise BackendError(f"pack: {not_fused(unsupported)}; an unpacked model calls its modules")
    return PackedModel(model, dtype)


def own_model(model: Any) -> "GPT | PackedModel":
    """Returns a packed model as it is, or the GPT within torch.compile or DataParallel.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(model, PackedModel):
        return model
    try:
        return unwrapped(model)
    except ConfigError:
        raise ConfigError(
            f"model must be a GPT or what gptfast.pack returns, got {kind_of(model)}"
        ) from None


def engine_device(op: str, model: GPT, dtype: str | None) -> str | None:
    """Returns the device whose engine computes a call, None where the modules are called instead.

    Args:
        op: The function that the user called, for errors and for the warning that a module keeps
            the engine from computing it.
        model: The GPT.
        dtype: As for `generate`.

    Raises:
        BackendError: `model.backend` is "fused" and the kernels cannot run, or a module is no plain
            layer.
    """
    device = model.main_weight.device.type
    chosen = activations(model.main_weight.dtype, dtype, device)
    head_dim = model.config.head_dim
    if model.backend == "fused":
        select.require_fused(op, device, chosen, "backend='reference'", head_dim)
    if model.backend == "reference" or select.unavailable(device, chosen, head_dim):
        return None
    unsupported = unsupported_part(model)
    if unsupported is None:
        return device
    reason = not_fused(unsupported)
    if model.backend == "fused":
        raise BackendError(f"{op}: {reason}; backend='auto' calls it, without a cache")
    warnings.warn(
        f"{op}: {reason}, so every step calls the modules, without a cache; merge it"
        " into the weights or remove it to be fast",
        stacklevel=4,  # the caller of generate, stream or score
    )
    return None


class PackedModel:
    """A model's weights in the engine's layout, for `generate`, `stream` and `score`.

    Packing takes about as long as generating a token, so `gptfast.pack` pays for a model that many
    calls use. Later changes of the model do not reach the packed one, unless `lasting=False`: that
    shares the model's vectors and embeddings, for a model that does not change meanwhile.

    Raises:
        ConfigError: `dtype` is None and the engine does not compute in the model's own.
        BackendError: There is no compiled engine.
    """

    def __init__(self, model: GPT, dtype: str | None, lasting: bool = True) -> None:
        config, own = model.config, model.wte.weight.dtype
        name = dtype or {FLOATS[name]: name for name in FLOATS}.get(own)
        if name is None:
            raise ConfigError(f"dtype must be one of {list(DTYPES)} for a model in {own}, got None")
        self.config, self.name = config, name
        self.dtype = activations(model.main_weight.dtype, dtype, "cpu")
        params = model.state_dict()

        def find(parameter: str) -> Any:
            # The engine takes float32 alone, which it rounds where it computes in bfloat16.
            found = params.get(parameter)
            return None if found is None else found.float().contiguous().numpy()

        self.compiled = _extension().Model(
            config.block_size,
            config.vocab_size,
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.attention,
            config.gelu,
            bf16=self.dtype == torch.bfloat16,
            int8=dtype == "int8",
            find=find,
            copy=lasting,
        )

    def check_dtype(self, dtype: str | None) -> None:
        """Raises ConfigError where the model has been packed for another dtype."""
        if dtype not in (None, self.name):
            raise ConfigError(f"dtype must be the packed model's, {self.name!r}, got {dtype!r}")

    @property
    def packed_bytes(self) -> int:
        """How many bytes the packed weights take."""
        return self.compiled.packed_bytes

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        """Scores windows of 2 to block_size + 1 tokens.

        Returns:
            Per window, the log-probabilities of the tokens after its first.
        """
        return self.compiled.score(windows)


class Engine:
    """Generates a request by the compiled engine; see sequences.GenerationLoop."""

    def __init__(self, packed: PackedModel, request: Request) -> None:
        extension, config = _extension(), packed.config
        self._request = request
        longest = max((len(prompt) for prompt in request.prompts), default=0)
        longest += request.max_new_tokens - 1
        window = config.block_size if config.attention else 1  # it reads no more of the cache
        options = extension.SessionOptions()
        options.capacity = max(1, min(window, longest))
        slot = packed.compiled.cache_bytes(options.capacity)
        options.first_layer_table = _table_pays(packed, request, slot)
        table = packed.compiled.first_layer_table_bytes() if options.first_layer_table else 0
        options.slots = slots_at_once(request, MAX_BATCH, options.capacity, slot, used_bytes=table)
        options.sampling = astuple(request.sampling)
        options.max_new_tokens = request.max_new_tokens
        options.stride = request.stride or 0
        options.top_logprobs = request.top_logprobs
        options.stop_tokens = request.stop_tokens
        if request.end_token is not None:
            options.end_token = request.end_token
        if request.stop_strings:
            options.stop_strings, options.pieces = request.stop_strings, request.pieces or []
        self._session = extension.Session(
            packed.compiled, request.prompts, request.seeds, request.sequence_ids, options
        )

    def run(self, seconds: float) -> bool:
        """See sequences.GenerationLoop."""
        more = self._session.run(seconds)
        if self._session.invalid >= 0:
            raise not_finite("prompt", self._session.invalid // self._request.num_samples)
        return more

    def updates(self) -> list[Update]:
        """See sequences.GenerationLoop."""
        return [Update(*each) for each in self._session.updates()]

    @property
    def cache_bytes(self) -> int:
        """How many bytes the cache and the first layer's table take."""
        return self._session.bytes


def _extension() -> Any:
    extension = select.extension()
    if extension is None:
        raise BackendError(f"{select.extension_error}")
    return extension


def _table_pays(packed: PackedModel, request: Request, slot_bytes: int) -> bool:
    """Whether to cache what the first layer projects for each (token, position).

    Every move of a window computes an entry per position anew. The table pays when an entry is used
    twice on average, and may take a quarter of the memory.
    """
    config = packed.config
    if request.stride is None or not config.attention or config.n_layer < 2:
        return False
    last = request.max_new_tokens - 1 - config.block_size  # moves after an empty prompt
    moves = sum(
        max(0, min(request.max_new_tokens, len(prompt) + last)) for prompt in request.prompts
    )
    if moves // request.stride < 2 * config.vocab_size:
        return False
    left = request.max_cache_bytes - slot_bytes
    return packed.compiled.first_layer_table_bytes() <= left // 4
