"""The compiled engine as Python sees it: a model's packed weights, and the sequences of a request.

Letters: L layers, C n_embd, D head_dim, T block_size, V vocab_size, N sequences.
"""

import warnings
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.errors import BackendError, ConfigError
from gptfast.generation.mergeable import engine_oddity
from gptfast.generation.request import (
    DTYPES,
    Progress,
    Request,
    check_dtype,
    not_finite,
    rows_at_once,
)
from gptfast.model import GPT
from gptfast.modules import Block, not_fused
from gptfast.ops import engine as ops
from gptfast.ops import select

ROOM = 4096  # tokens that a sequence has places for at first; its next places are twice as many
_COLUMN = {name: i for i, name in enumerate(ops.FIELDS)}
_STATE = {name: i for i, name in enumerate(ops.STATES)}


def pack(model: GPT, dtype: str | None = None) -> "PackedModel":
    """Packs a model's weights once for many calls of `generate`, `stream` and `score`.

    Args:
        model: The GPT; what happens to it later does not reach the result.
        dtype: As for `generate`, which then takes no other; "int8" computes with activations and
            cache in bf16 where the processor multiplies bf16, else in float32.

    Raises:
        ConfigError: `dtype` is unknown.
        BackendError: The kernels cannot run, the model's backend is "reference", or one of its
            modules is no plain layer.
    """
    check_dtype(dtype)
    if model.backend == "reference":
        raise BackendError("pack: the model's backend is 'reference', which packs nothing")
    device = model.main_weight.device.type
    if device != "cpu":
        raise BackendError(f"pack: the compiled engine is for the CPU, the model is on {device!r}")
    select.require_fused("pack", device, _activations(model, dtype), "an unpacked model")
    oddity = engine_oddity(model)
    if oddity is not None:
        raise BackendError(f"pack: {not_fused(oddity)}; an unpacked model calls its modules")
    return PackedModel(model, dtype)


def packed_for(
    op: str, model: "GPT | PackedModel", dtype: str | None, lasting: bool = False
) -> "PackedModel | None":
    """The model packed for the compiled engine; None where that does not compute.

    `op` is who asks, for the error, and for the warning that a module keeps the engine from it;
    `lasting` says that the model may change before it is done.

    Raises:
        ConfigError: The model has been packed for another dtype.
        BackendError: The kernels are asked for and cannot run, or do not know one of the modules.
    """
    if isinstance(model, PackedModel):
        if dtype not in (None, model.name):
            raise ConfigError(f"dtype must be the packed model's, {model.name!r}, got {dtype!r}")
        return model
    device, chosen = model.main_weight.device.type, _activations(model, dtype)
    if model.backend == "fused":
        select.require_fused(op, device, chosen, "backend='reference'")
    if model.backend == "reference" or select.unavailable(device, chosen):
        return None
    oddity = engine_oddity(model)
    if oddity is None:
        return PackedModel(model, dtype, lasting) if device == "cpu" else None
    if model.backend == "fused":
        raise BackendError(f"{op}: {not_fused(oddity)}; backend='auto' calls it, without a cache")
    warnings.warn(
        f"{op}: {not_fused(oddity)}, so every step calls the modules, without a cache; merge it"
        " into the weights or remove it to be fast",
        stacklevel=4,  # the caller of generate, stream or score
    )
    return None


def _activations(model: GPT, dtype: str | None) -> torch.dtype:
    if dtype is None:
        return model.main_weight.dtype
    if dtype == "int8":  # whole numbers of 8 bits are exact in bfloat16: it costs their range alone
        extension = select.extension()
        fast = extension is not None and extension.isa_current() in ("avx512_bf16", "amx")
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


class PackedModel:
    """A model's weights in the engine's layout, for `generate`, `stream` and `score`.

    Packing takes about as long as a token; a model that many calls use is better packed once, by
    `gptfast.pack`. Later changes of the model do not reach it; one during whose life there are none
    (`lasting=False`) may share the model's vectors.

    Raises:
        ConfigError: `dtype` is None and the engine does not compute in the model's own.
    """

    def __init__(self, model: GPT, dtype: str | None, lasting: bool = True) -> None:
        config = model.config
        own = model.wte.weight.dtype
        name = dtype or {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(own)
        if name is None:
            raise ConfigError(f"dtype must be one of {list(DTYPES)} for a model in {own}, got None")
        self.config, self.name, self._lasting = config, name, lasting
        self.dtype, self._int8 = _activations(model, dtype), dtype == "int8"
        self._params: list[Tensor] = []
        self._packed: list[Tensor] = []
        self._add_param(model.wte.weight)
        self._add_param(model.wpe.weight)
        for block in model.blocks:
            self._add_block(block, last=block is model.blocks[-1])
        self._add_norm(model.ln_f)
        self._add_weight(model.lm_head.weight)

    def _add_block(self, block: Block, last: bool) -> None:
        C = self.config.n_embd
        if self.config.attention:
            c_attn, c_proj = block.attn.c_attn, block.attn.c_proj
            self._add_norm(block.ln_1)
            for rows in (slice(C), slice(C, None)) if last else (slice(None),):
                self._add_weight(c_attn.weight[rows])
                self._add_param(None if c_attn.bias is None else c_attn.bias[rows])
            self._add_weight(c_proj.weight)
            self._add_param(c_proj.bias)
        self._add_norm(block.ln_2)
        for linear in (block.mlp.c_fc, block.mlp.c_proj):
            self._add_weight(linear.weight)
            self._add_param(linear.bias)

    def _add_norm(self, norm: torch.nn.LayerNorm) -> None:
        self._add_param(norm.weight)
        self._add_param(norm.bias)

    def _add_param(self, param: Tensor | None) -> None:
        own = torch.empty(0) if param is None else param.detach().float()
        self._params.append(own.clone() if self._lasting else own)

    def _add_weight(self, weight: Tensor) -> None:
        # A model in bfloat16 may compute in float32: widened parameters serve both.
        self._packed.append(
            ops.pack_weight(weight.detach().float().contiguous(), self.dtype, self._int8)
        )

    def row_bytes(self, capacity: int) -> int:
        """Bytes of the keys and values of one sequence of up to `capacity` tokens."""
        extension, config = select.extension(), self.config
        if extension is None:
            raise BackendError(f"{select.extension_error}")
        bf16 = self.dtype == torch.bfloat16
        return config.n_layer * extension.cache_bytes(
            bf16, config.block_size, config.n_head, config.head_dim, capacity
        )

    def new_cache(self, rows: int, capacity: int) -> Tensor:
        """Keys and values of `rows` sequences, (rows, elements)."""
        return torch.zeros(rows, self.row_bytes(capacity) // self.dtype.itemsize, dtype=self.dtype)

    def generate(
        self,
        state: list[Tensor],
        cache: Tensor,
        table: list[Tensor],
        stops: list[Tensor],
        capacity: int,
        *options: float,
    ) -> tuple[int, int]:
        """Calls ops.engine.generate with this model."""
        return ops.generate(
            state,
            cache,
            table,
            self._params,
            self._packed,
            stops,
            *self._description(capacity),
            *options,
        )

    def score(self, tokens: Tensor, targets: Tensor, starts: Tensor, capacity: int) -> Tensor:
        """Calls ops.engine.score with this model."""
        if not self.config.attention:
            capacity = 1  # nothing is kept
        cache = self.new_cache(len(starts) - 1, capacity)
        return ops.score(
            tokens,
            targets,
            starts,
            cache,
            self._params,
            self._packed,
            *self._description(capacity),
        )

    def _description(self, capacity: int) -> tuple[int, int, bool, str, bool, int]:
        c = self.config
        return c.n_layer, c.n_head, c.attention, c.gelu, self._int8, capacity


class Engine:
    """The sequences of a request, in memory that the engine reads and writes; see request.Loop."""

    # Plain Python, and as few calls as there may be: where other work had the caches before, each
    # first call into a library takes as long as a token of a small model.
    def __init__(self, model: PackedModel, request: Request) -> None:
        self._request, self._model = request, model
        config, sampling = model.config, request.sampling
        state = _STATE["waiting" if request.max_new_tokens > 0 else "length"]
        room = min(request.max_new_tokens, ROOM)
        beyond = request.max_new_tokens - room
        self._sequences = array("q")  # (N, FIELDS)
        places, longest, moves, first = 0, 0, 0, dict[tuple[int, ...], int]()
        prompts = zip(request.prompts, request.seeds, request.numbers, strict=True)
        for i, (prompt, seed, number) in enumerate(prompts):
            length, twin = len(prompt), first.setdefault(tuple(prompt), i)
            limit = length + room
            counts = (places, length, length, limit)
            self._sequences.extend((*counts, 0, 0, 0, state, seed, number, twin, beyond))
            places, longest = places + limit, max(longest, limit + beyond - 1)
            moves += max(0, min(request.max_new_tokens, limit + beyond - 1 - config.block_size))
        self._places = self._new_places(places)
        begins = self._sequences[:: len(ops.FIELDS)]
        for begin, prompt in zip(begins, request.prompts, strict=True):
            self._places[0][begin : begin + len(prompt)] = prompt
        self._state = [_shared(self._sequences), *map(torch.from_numpy, self._places)]
        self._used = places
        self._reported: np.ndarray | int = 0  # no length is 0
        window = config.block_size if config.attention else 1  # the rest would never be read
        self._capacity = max(1, min(window, longest))
        self._table = self._new_table(moves)
        self._cache = self._model.new_cache(self._rows(len(request.prompts)), self._capacity)
        self._stops = [
            _shared(array("q", request.stop_tokens)),
            *_bytes(request.stop_strings),
            *_bytes((request.pieces or ()) if request.stop_strings else ()),
        ]
        self._options = (
            sampling.temperature,
            min(sampling.top_k or 0, config.vocab_size),
            1.0 if sampling.top_p is None else sampling.top_p,
            sampling.min_p or 0.0,
            sampling.repetition_penalty,
            request.stride or 0,
        )

    def run(self, seconds: float) -> bool:
        """See Loop."""
        unfinished, invalid = self._model.generate(
            self._state,
            self._cache,
            self._table,
            self._stops,
            self._capacity,
            *self._options,
            seconds,
        )
        if invalid >= 0:
            raise not_finite("prompt", invalid // self._request.num_samples)
        if unfinished and self._request.max_new_tokens > ROOM:
            self._make_room()
        return unfinished > 0

    def progress(self, i: int, first: int = 0) -> Progress:
        """See Loop."""
        own = i * len(ops.FIELDS)
        begin, length, prompt, state = (
            self._sequences[own + _COLUMN[field]]
            for field in ("begin", "length", "prompt", "state")
        )
        start, end = begin + prompt + first, begin + length
        tokens, logprobs, likeliest, theirs = (each[start:end] for each in self._places)
        found = Progress(ops.STATES[state], tokens.tolist(), logprobs.tolist())
        if self._request.alternatives:
            rows = zip(likeliest.tolist(), theirs.tolist(), strict=True)
            found.alternatives = [list(zip(*row, strict=True)) for row in rows]
        return found

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values, and of what is known of the first layer."""
        return sum(x.nbytes for x in (self._cache, *self._table))

    def changed(self) -> list[int]:
        """See Loop."""
        now = self._matrix()[:, [_COLUMN["length"], _COLUMN["state"]]]
        found = np.flatnonzero((now != self._reported).any(axis=1)).tolist()
        self._reported = now
        return found

    def _new_places(self, count: int) -> list[np.ndarray]:
        """Memory for tokens, their log-probabilities, the likeliest tokens and theirs.

        numpy's zeros take no memory before they are written.
        """
        both = np.int64, np.float32
        shapes = count, (count, self._request.alternatives)
        return [np.zeros(shape, dtype) for shape in shapes for dtype in both]

    def _make_room(self) -> None:
        """Gives sequences without a place for their next token new places, twice as many.

        Wherever Ctrl-C interrupts this, `progress` says what it said before.
        """
        sequences = self._matrix()
        length, limit, state = (sequences[:, _COLUMN[x]] for x in ("length", "limit", "state"))
        for i in np.flatnonzero((state == _STATE["running"]) & (length == limit)):
            self._move(sequences[i])

    def _move(self, own: np.ndarray) -> None:
        begin, length, prompt, limit, beyond = (
            int(own[_COLUMN[field]]) for field in ("begin", "length", "prompt", "limit", "beyond")
        )
        more = min(beyond, limit - prompt)
        start = self._used
        self._used += limit + more
        if self._used > len(self._places[0]):
            self._enlarge(max(self._used, 2 * len(self._places[0])))
        for each in self._places:
            each[start : start + length] = each[begin : begin + length]
        own[[_COLUMN[field] for field in ("begin", "limit", "beyond")]] = (
            start, limit + more, beyond - more,
        )  # fmt: skip

    def _enlarge(self, count: int) -> None:
        # What has not been written is not read either: that would take memory.
        places = self._new_places(count)
        for begin, length in self._matrix()[:, [_COLUMN["begin"], _COLUMN["length"]]].tolist():
            for new, old in zip(places, self._places, strict=True):
                new[begin : begin + length] = old[begin : begin + length]
        self._places = places
        self._state[1:] = map(torch.from_numpy, places)

    def _matrix(self) -> np.ndarray:
        """The sequences, (N, FIELDS), in their own memory."""
        return np.frombuffer(self._sequences, dtype=np.int64).reshape(-1, len(ops.FIELDS))

    def _new_table(self, moves: int) -> list[Tensor]:
        """Memory for what the first layer gives for each (token, position), where that pays.

        A window that moves needs one entry per position.
        """
        config, stride = self._model.config, self._request.stride
        if stride is None or not config.attention or config.n_layer < 2:
            return []
        if moves // stride < 2 * config.vocab_size:  # how often an entry is needed, on average
            return []
        entries = config.block_size * config.vocab_size
        size = entries * 3 * config.n_embd * self._model.dtype.itemsize
        if size > (self._request.max_cache_bytes - self._model.row_bytes(self._capacity)) // 4:
            return []
        qkv = torch.empty(entries, 3 * config.n_embd, dtype=self._model.dtype)
        return [qkv, torch.zeros(entries, dtype=torch.uint8)]

    def _rows(self, sequences: int) -> int:
        """How many sequences run at once."""
        row = self._model.row_bytes(self._capacity)
        table = sum(each.nbytes for each in self._table)
        return rows_at_once(self._request, sequences, self._capacity, row, table)


_DTYPES = {"B": torch.uint8, "q": torch.int64}
_EMPTY = {code: torch.empty(0, dtype=dtype) for code, dtype in _DTYPES.items()}


def _shared(values: "array[Any]") -> Tensor:
    """A tensor of the same memory."""
    if not values:
        return _EMPTY[values.typecode]
    return torch.frombuffer(values, dtype=_DTYPES[values.typecode])


def _bytes(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as bytes one after the other, uint8, and where each starts and the last ends."""
    if not texts:
        return _NO_BYTES
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    starts = array("q", accumulate(map(len, encoded), initial=0))
    return _shared(array("B", b"".join(encoded))), _shared(starts)


_NO_BYTES = _shared(array("B")), _shared(array("q", [0]))
