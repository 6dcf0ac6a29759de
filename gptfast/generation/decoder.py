"""The part of generation that lives on the device: text, progress, caches, and a step that draws.

A step computes one token for every slot, draws the next, and decides which slots go on. Steps are
queued several at a time; what they drew is read while the next ones run. On a GPU the second call
of each kind is captured as a CUDA graph, which all later ones replay.

Letters: S slots, n of them in a call, T time, C n_embd, H heads, D head_dim, V vocab_size,
L layers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.generation.weights import Linear, Weights
from gptfast.ops.int8 import Int8Weight
from gptfast.ops.sampling import Sampling
from gptfast.ops.triton.decode import decode_attention, fill_cache, next_windows
from gptfast.ops.triton.few_rows import Append, Embedding, few_rows_linear
from gptfast.ops.triton.sampling import Kind, Progress, numbers_of, sample

UNROLLED = 8  # steps in the larger of the two graphs
MOST_STEPS = 128  # to be queued before a look
FLIGHTS = 3  # queued results that may be unread at once, plus one
FILL_ROWS = 16384  # rows of an activation at most, while windows are computed
LARGE_BYTES = 32 << 20  # of weights, which do not stay in the L2 cache
MOST_SLOTS_AHEAD = 128
FIELDS = "tokens", "lengths", "offsets", "drawn", "limits", "seeds", "sequence_ids"


class Start(NamedTuple):
    """A sequence that gets a slot."""

    slot: int
    window: list[int]
    offset: int  # where the window starts
    limit: int  # tokens to draw
    seed: int
    sequence_id: int
    text: list[int]  # what the repetition penalty applies to


class Shape(NamedTuple):
    """What the tensors and graphs of a decoder depend on, apart from the weights."""

    config: GPTConfig
    dtype: str | None
    copied: bool  # whether the weights are copies because the model may change meanwhile
    slots: int
    capacity: int  # tokens of a slot's cache
    kind: Kind


class Flight(NamedTuple):
    """Steps that have been queued: their results, and when these have arrived."""

    steps: int
    results: Tensor  # (>= steps, 2, >= S) int32: tokens, -1 where a slot did not run; logprobs
    arrived: Any  # torch.cuda.Event; None on the CPU


class Decoder:
    """The tensors of S slots, none of which moves or changes its shape: graphs refer to them."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        config, device = shape.config, weights.wte.device
        S, C, V = shape.slots, config.n_embd, config.vocab_size
        self.shape, self.weights = shape, weights

        def zeros(*size: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        even = S + S % 2  # aligns every field
        self._state = zeros(len(FIELDS), even, dtype=torch.int64)[:, :S]
        fields = dict(zip(FIELDS, self._state, strict=True))
        self._seeds, self._sequence_ids = fields.pop("seeds"), fields.pop("sequence_ids")
        text = zeros(S, shape.capacity, dtype=torch.int64)
        self._progress = Progress(**fields, text=text, block_size=config.block_size)
        self._numbers = zeros(5, dtype=torch.float64)
        self._x, self._q, self._attended = (zeros(S, C) for _ in range(3))
        self._hidden = zeros(S, 4 * C)
        columns = -(-V // 16) * 16  # aligns every row
        self._logits = zeros(S, columns, dtype=torch.float32)
        self._seen = zeros(S, columns, dtype=torch.uint8) if shape.kind.penalty else None
        caches = config.n_layer if config.attention else 0
        self._cache = zeros(caches, S, 2, config.n_head, shape.capacity, config.head_dim)
        self._members = zeros(S, dtype=torch.int64)  # the slots whose windows are computed
        self._listed: list[int] = []  # what `_members` holds
        padded = -(-S // 4) * 4  # aligns every step's results
        self._drawn = zeros(UNROLLED, 2, padded, dtype=torch.int32)
        self._results = torch.zeros(
            FLIGHTS, MOST_STEPS + UNROLLED, 2, padded, dtype=torch.int32,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        self._flight = 0
        self._used: set[Any] = set()
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None

    @property
    def bytes(self) -> int:
        """How many bytes caches, logits and copied weights take."""
        return self._cache.nbytes + self._logits.nbytes + self.weights.bytes

    def set_sampling(self, how: Sampling) -> None:
        """Sets the numbers of sampling, whose kind is that of the decoder."""
        self._numbers.copy_(torch.tensor(numbers_of(how), dtype=torch.float64))

    def clear(self) -> None:
        """Stops all slots."""
        self._state.zero_()

    def start(self, sequences: list[Start]) -> None:
        """Gives slots to sequences, and fills their caches for all tokens but the last."""
        capacity = self.shape.capacity
        rows = np.zeros((len(sequences), 1 + len(FIELDS) + capacity), np.int64)
        for row, each in zip(rows, sequences, strict=True):
            length = len(each.window)
            row[: 1 + len(FIELDS)] = (
                each.slot, each.window[-1], length, each.offset, 0, each.limit, each.seed,
                each.sequence_id,
            )  # fmt: skip
            text = row[1 + len(FIELDS) :]
            text[(each.offset + np.arange(length)) % capacity] = each.window
        moved = self._on_device(torch.from_numpy(rows))
        slots, fields, texts = moved.tensor_split((1, 1 + len(FIELDS)), 1)
        self._state[:, slots[:, 0]] = fields.t()
        self._progress.text[slots[:, 0]] = texts
        if self._seen is not None:
            seen = torch.zeros(len(sequences), self._seen.shape[1], dtype=torch.uint8)
            for i, each in enumerate(sequences):
                seen[i, each.text] = 1
            self._seen[slots[:, 0]] = self._on_device(seen)
        if self.shape.config.attention:
            self._fill_by_length({each.slot: len(each.window) - 1 for each in sequences})

    def slide(self, slots: list[int], stride: int) -> None:
        """Moves the windows of slots, which are full, by `stride` tokens, and computes them."""
        self._fill(slots, max(1, self.shape.config.block_size - stride), stride)

    def queue(self, steps: int, before_each: Callable[[int], int]) -> Flight:
        """Queues steps of all slots.

        Args:
            steps: How many at least, at most MOST_STEPS.
            before_each: Called with the number of steps still to be queued; returns how many are to
                follow at once, 1 or UNROLLED. It may queue slides.
        """
        self._flight = (self._flight + 1) % FLIGHTS
        results = self._results[self._flight]
        done = 0
        while done < steps:
            count = before_each(steps - done)
            self._run(("steps", count), "step", functools.partial(self._steps, count))
            results[done : done + count].copy_(self._drawn[:count], non_blocking=True)
            done += count
        arrived = None
        if self._state.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return Flight(done, results, arrived)

    def read(self, flight: Flight) -> tuple[Any, Any]:
        """Waits for queued steps.

        Returns:
            Tokens (S, steps) int32, -1 where the slot did not run, and log-probabilities (S, steps)
            float32, NaN where a logit was not finite.
        """
        if flight.arrived is not None:
            flight.arrived.synchronize()
        found = flight.results[: flight.steps, :, : self.shape.slots].numpy()
        tokens, logprobs = (np.ascontiguousarray(found[:, i].T) for i in range(2))
        return tokens, logprobs.view(np.float32)

    def logits(self, slots: list[int]) -> Tensor:
        """Returns the logits that the last step drew from, (n, V) float32."""
        at = self._on_device(torch.tensor(slots))
        return self._logits[at, : self.shape.config.vocab_size]

    def _steps(self, count: int) -> None:
        for i in range(count):
            self._step(self._drawn[i])

    @torch.no_grad()
    def _step(self, found: Tensor) -> None:
        x, progress, weights = self._x, self._progress, self.weights
        embedding: Embedding | None = Embedding(
            progress.tokens, progress.lengths, weights.wte, weights.wpe, self.shape.capacity
        )
        ahead = _after_next(weights, self.shape.slots)
        for i, layer in enumerate(weights.layers):
            if layer.qkv is not None and layer.proj is not None:
                append = Append(self._cache[i], progress.lengths, progress.drawn, progress.limits)
                few_rows_linear(
                    x, *layer.qkv, self._q, norm=layer.ln_1, embedding=embedding, append=append,
                    ahead=next(ahead),
                )  # fmt: skip
                embedding = None
                decode_attention(
                    self._q, self._cache[i], progress.lengths, self._attended,
                    self.shape.config.block_size,
                )  # fmt: skip
                few_rows_linear(self._attended, *layer.proj, x, residual=x, ahead=next(ahead))
            few_rows_linear(
                x, *layer.fc, self._hidden, norm=layer.ln_2, gelu=self.shape.config.gelu,
                embedding=embedding, ahead=next(ahead),
            )  # fmt: skip
            embedding = None
            few_rows_linear(self._hidden, *layer.fc_proj, x, residual=x, ahead=next(ahead))
        norm, head = weights.head
        few_rows_linear(x, head, None, self._logits, norm=norm)
        tokens, logprobs = found[:, : self.shape.slots]
        sample(
            self.shape.kind, self._numbers, self._logits, self.shape.config.vocab_size, self._seen,
            self._seeds, self._sequence_ids, progress.drawn, tokens,
            logprobs.view(torch.float32), progress,
        )  # fmt: skip

    def _fill_by_length(self, lengths: dict[int, int]) -> None:
        """Computes the first positions of slots, those of similar lengths together."""
        groups: dict[int, list[int]] = {}
        for slot, length in lengths.items():
            if length > 0:
                longest = min(max(16, 1 << (length - 1).bit_length()), self.shape.capacity)
                groups.setdefault(longest, []).append(slot)
        for longest in sorted(groups):
            self._fill(groups[longest], longest, 0)

    def _fill(self, slots: list[int], T: int, stride: int) -> None:
        most = 1 << (max(1, FILL_ROWS // T).bit_length() - 1)
        for first in range(0, len(slots), most):
            group = slots[first : first + most]
            n = min(1 << (len(group) - 1).bit_length(), self.shape.slots)
            listed = group + [-1] * (n - len(group))
            if listed != self._listed:
                self._members[:n] = self._on_device(torch.tensor(listed))
                self._listed = listed
            key = ("windows", n, T, stride)
            self._run(key, key, functools.partial(self._compute_windows, n, T, stride))

    @torch.no_grad()
    def _compute_windows(self, n: int, T: int, stride: int) -> None:
        """Fills the caches of the first n members for the first T positions of their windows."""
        progress, weights, config = self._progress, self.weights, self.shape.config
        slots = self._members[:n]
        idx = next_windows(
            slots, progress.lengths, progress.offsets, progress.drawn, progress.limits,
            progress.text, T, config.block_size, stride,
        )  # fmt: skip
        if not config.attention:
            return
        C = config.n_embd
        x = ops.embedding(idx, weights.wte, weights.wpe, dtype=weights.dtype)  # (n, T, C)
        for i, layer in enumerate(weights.layers):
            assert layer.ln_1 is not None and layer.qkv is not None and layer.proj is not None
            weight, bias = self._dense(layer.qkv)
            if i + 1 == config.n_layer:  # nothing reads the last layer's output
                bias = None if bias is None else bias[C:]
                kv = ops.layer_norm_linear(x, *layer.ln_1, weight[C:], bias)
                fill_cache(kv, slots, progress.lengths, self._cache[i])
                return
            qkv = ops.layer_norm_linear(x, *layer.ln_1, weight, bias)  # (n, T, 3 C)
            fill_cache(qkv[:, :, C:], slots, progress.lengths, self._cache[i])
            heads = qkv.unflatten(-1, (3, config.n_head, -1)).permute(2, 0, 3, 1, 4)
            y = ops.causal_attention(*heads.unbind(0)).transpose(1, 2).flatten(2)  # (n, T, C)
            x = ops.linear_residual(y, *self._dense(layer.proj), x)
            x = ops.layer_norm_ffn(
                x, *layer.ln_2, *self._dense(layer.fc), *self._dense(layer.fc_proj),
                gelu=config.gelu,
            )  # fmt: skip

    def _dense(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        """A linear layer for the operators of training, which do not read weights of 8 bits.

        Products of many rows take longer than this copy, whose memory the next layer uses again.
        """
        weight, bias = linear
        if isinstance(weight, Int8Weight):
            weight = weight.dense(self.weights.dtype)
        return weight, bias

    def _run(self, key: Any, warmed_by: Any, function: Callable[[], None]) -> None:
        """Calls a function the first time, which compiles and tunes kernels; replays it later.

        Args:
            key: What the graph is kept by.
            warmed_by: What a first call is known by; functions with the same kernels share it.
            function: Queues kernels that work on this object's tensors alone.
        """
        if not self._state.is_cuda or warmed_by not in self._used:
            self._used.add(warmed_by)
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = self._captured(function)
        self._graphs[key].replay()

    def _captured(self, function: Callable[[], None]) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # one for all: they run one after another
        graph = torch.cuda.CUDAGraph()
        # torch's default capture stream belongs to the first device that the process captured on.
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            function()
        return graph

    def _on_device(self, values: Tensor) -> Tensor:
        if not self._state.is_cuda:
            return values
        return values.pin_memory().to(self._state.device, non_blocking=True)


def _after_next(weights: Weights, slots: int) -> Iterator[Tensor | None]:
    """Yields, for each linear layer in turn, the weight of the second one after it.

    That is None if the weights stay in the L2 cache, or if so many slots keep the GPU busy longer
    than it takes to read a weight.
    """
    linears = ((each.qkv, each.proj, each.fc, each.fc_proj) for each in weights.layers)
    read = [linear[0] for layer in linears for linear in layer if linear is not None]
    read.append(weights.head[1])
    found = [each.values if isinstance(each, Int8Weight) else each for each in read]
    if slots > MOST_SLOTS_AHEAD or sum(each.nbytes for each in found) < LARGE_BYTES:
        found = []
    yield from found[2:]
    yield from itertools.repeat(None)


def slots_bucket(slots: int) -> int:
    """Rounds slots up to a power of 2, so that calls of similar sizes share a decoder."""
    return 1 << (slots - 1).bit_length()


def capacity_bucket(capacity: int, block_size: int) -> int:
    """Rounds a capacity up to 64, 128, ... tokens, at most block_size."""
    return min(block_size, max(64, 1 << math.ceil(math.log2(capacity))))
