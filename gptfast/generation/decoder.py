"""The part of generation that lives on the device: text, progress, caches, and a step that draws.

A step computes one token for every slot, draws the next, and decides which slots go on. Steps are
queued several at a time; what they drew is read while the next ones run. On a GPU the second call
of each kind is captured as a CUDA graph, which all later ones replay.

Letters: S slots, n of them in a call, T time, C n_embd, H heads, D head_dim, V vocab_size,
L layers.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptfast import ops
from gptfast.captures import captured
from gptfast.config import GPTConfig
from gptfast.generation.sizes import fill_length, slots_bucket, unrolled
from gptfast.generation.weights import Linear, Weights
from gptfast.ops.int8 import Int8Weight
from gptfast.ops.sampling import Sampling
from gptfast.ops.triton.decode import decode_attention, fill_cache, next_windows
from gptfast.ops.triton.few_rows import Append, Embedding, few_rows_linear
from gptfast.ops.triton.sampling import Kind, Progress, numbers_of, sample
from gptfast.ops.triton.slots import COLUMNS, FIELDS, start_slots

MOST_STEPS = 128  # that one call queues at most
FLIGHTS = 3  # queued results that may be unread at once
FILL_ROWS = 16384  # most rows of an activation while windows are computed
UNKNOWN_SECONDS = 1.0

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Starts(NamedTuple):
    """n sequences that get slots."""

    slots: Ints  # (n,)
    texts: Ints  # the tokens of all texts, one after the other
    lengths: Ints  # (n,), of the texts
    offsets: Ints  # (n,), where in its text each window starts
    limits: Ints  # (n,), tokens to draw
    seeds: Ints  # (n,)
    sequence_ids: Ints  # (n,)


class StepRun(NamedTuple):
    """Steps in a row. Windows of some slots may move before the first of them, or before each."""

    steps: int
    slots: Ints | None = None  # whose windows move; they are full
    stride: int = 0  # by how many tokens
    each: bool = False


class Shape(NamedTuple):
    """What the tensors and graphs of a decoder depend on, apart from the weights."""

    config: GPTConfig
    dtype: str | None
    copied: bool  # whether the weights are copies because the model may change meanwhile
    slots: int
    capacity: int  # tokens of a slot's cache
    kind: Kind
    precision: str  # of products, which torch's settings choose for float32


class InFlight(NamedTuple):
    """Steps that have been queued: their results, and when these have arrived."""

    steps: int
    results: Tensor  # (MOST_STEPS, 2, >= S) int32: tokens, -1 where a slot did not run; logprobs
    arrived: Any  # torch.cuda.Event; None on the CPU
    before: Any  # `arrived` of the flight queued before it


class Order:
    """Keeps a decoder's work in order when calls queue it on several streams, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            # torch returns freed memory to the stream that allocated it: this one.
            self._first = self._last = torch.cuda.current_stream(device)

    def begin(self) -> None:
        """Makes the current stream wait for work that was queued on another one."""
        if self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            if current != self._last:
                current.wait_stream(self._last)
                self._last = current

    def end(self) -> None:
        """Makes the allocating stream wait, so that no other one still uses memory freed on it."""
        if self._device.type == "cuda" and self._last != self._first:
            self._first.wait_stream(self._last)


class Decoder:
    """The tensors of S slots. None moves or changes its shape, because graphs refer to them."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        config, device = shape.config, weights.wte.device
        S, C, V = shape.slots, config.n_embd, config.vocab_size
        self.shape, self.weights, self.order = shape, weights, Order(device)

        def zeros(*size: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        even = S + S % 2  # aligns every field
        self._idle = zeros(len(FIELDS), even, dtype=torch.int64)
        self._idle[FIELDS.index("lengths")] = 1  # steps compute idle slots along with the others
        self._whole_state = self._idle.clone()
        self._state = self._whole_state[:, :S]
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
        self._listed = b""  # what `_members` begins with
        sizes = [fill_length(length, shape.capacity) for length in range(shape.capacity + 1)]
        self._padded = np.array(sizes, np.int64)
        padded = -(-S // 4) * 4  # aligns every step's results
        self._unrolled = unrolled(config.n_layer)
        self._drawn = zeros(self._unrolled, 2, padded, dtype=torch.int32)
        self._results = torch.zeros(
            FLIGHTS, MOST_STEPS, 2, padded, dtype=torch.int32, device="cpu",
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        self._flight = 0
        self._arrived: Any = None  # of the flight queued last
        self.step_seconds = UNKNOWN_SECONDS  # of the device, as last measured
        self._sampled: list[float] = []
        self._used: set[Any] = set()
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._state.device

    @property
    def bytes(self) -> int:
        """How many bytes caches, logits and copied weights take; graphs have others besides."""
        return self._cache.nbytes + self._logits.nbytes + self.weights.bytes

    def set_sampling(self, how: Sampling) -> None:
        """Sets the numbers of sampling; its kind must be the decoder's."""
        numbers = numbers_of(how)
        if numbers != self._sampled:
            self._numbers.copy_(torch.tensor(numbers, dtype=torch.float64))
            self._sampled = numbers

    def clear(self) -> None:
        """Stops all slots, also those that run on because nobody read their last steps."""
        self.order.begin()
        self._whole_state.copy_(self._idle)
        self._arrived = None

    def start(self, starts: Starts) -> None:
        """Gives slots to sequences, and fills their caches for all tokens but the last."""
        slots, texts, lengths, offsets, *rest = starts
        n = len(slots)
        begins = len(COLUMNS) * n + np.cumsum(lengths) - lengths
        given = self._uploaded(slots, begins, lengths, offsets, *rest, texts)
        start_slots(given, n, self._state, self._progress.text, self._seen)
        if self.shape.config.attention:
            self._fill_by_length(slots, lengths - offsets - 1)

    def queue(self, runs: Iterable[StepRun]) -> InFlight:
        """Queues steps of all slots, at most MOST_STEPS."""
        self._flight = (self._flight + 1) % FLIGHTS
        results = self._results[self._flight]
        done = 0
        for run in runs:
            for count in self._run_steps(run):
                results[done : done + count].copy_(self._drawn[:count], non_blocking=True)
                done += count
        before, self._arrived = self._arrived, None
        if self._state.is_cuda:
            self._arrived = torch.cuda.Event(enable_timing=True)
            self._arrived.record()
        return InFlight(done, results, self._arrived, before)

    def read(self, flight: InFlight) -> tuple[Any, Any]:
        """Waits for queued steps.

        Returns:
            Tokens (S, steps) int32, -1 where the slot did not run, and log-probabilities (S, steps)
            float32, NaN where a logit was not finite.
        """
        if flight.arrived is not None:
            flight.arrived.synchronize()
            if flight.before is not None:
                milliseconds = flight.before.elapsed_time(flight.arrived)
                self.step_seconds = max(1e-3 * milliseconds / flight.steps, 1e-7)
        found = flight.results[: flight.steps, :, : self.shape.slots].numpy()
        tokens, logprobs = (np.ascontiguousarray(found[:, i].T) for i in range(2))
        return tokens, logprobs.view(np.float32)

    def logits(self, slots: Ints) -> Tensor:
        """Returns the logits that the last step drew from, (n, V) float32."""
        return self._logits[self._uploaded(slots), : self.shape.config.vocab_size]

    def _steps(self, found: Tensor) -> None:
        """Takes a step of all slots for each item of `found`, (steps, 2, >= S) int32."""
        for each in found:
            self._step(each)

    @torch.no_grad()
    def _step(self, found: Tensor) -> None:
        x, progress, weights = self._x, self._progress, self.weights
        embedding: Embedding | None = Embedding(
            progress.tokens, progress.lengths, weights.wte, weights.wpe, self.shape.capacity
        )
        for i, layer in enumerate(weights.layers):
            if layer.qkv is not None and layer.proj is not None:
                append = Append(self._cache[i], progress.lengths, progress.drawn, progress.limits)
                few_rows_linear(
                    x, *layer.qkv, self._q, norm=layer.ln_1, embedding=embedding, append=append,
                )  # fmt: skip
                embedding = None
                decode_attention(
                    self._q, self._cache[i], progress.lengths, self._attended,
                    self.shape.config.block_size,
                )  # fmt: skip
                few_rows_linear(self._attended, *layer.proj, x, residual=x)
            few_rows_linear(
                x, *layer.fc, self._hidden, norm=layer.ln_2, gelu=self.shape.config.gelu,
                embedding=embedding,
            )  # fmt: skip
            embedding = None
            few_rows_linear(self._hidden, *layer.fc_proj, x, residual=x)
        norm, head = weights.head
        few_rows_linear(x, head, None, self._logits, norm=norm)
        tokens, logprobs = found[:, : self.shape.slots]
        sample(
            self.shape.kind, self._numbers, self._logits, self.shape.config.vocab_size, self._seen,
            self._seeds, self._sequence_ids, progress.drawn, tokens,
            logprobs.view(torch.float32), progress,
        )  # fmt: skip

    def _run_steps(self, run: StepRun) -> Iterator[int]:
        """Queues steps in runs that each have a graph; yields the length of each run."""
        left, slots, stride, each = run
        T = max(1, self.shape.config.block_size - stride)
        together = each and slots is not None and len(slots) <= self._at_once(T)
        n = self._list(slots) if together and slots is not None else 0
        while left > 0:
            count = 1 << min(self._unrolled, left).bit_length() - 1
            if together:
                key: Any = "moving", n, T, stride
                steps = functools.partial(self._moving_steps, count, n, T, stride)
                self._run((*key, count), key, steps)
            else:
                if slots is not None:
                    self._fill(slots, T, stride)
                    count, slots = (1, slots) if each else (count, None)
                self._run(
                    ("steps", count), "step", functools.partial(self._steps, self._drawn[:count])
                )
            yield count
            left -= count

    def _moving_steps(self, count: int, n: int, T: int, stride: int) -> None:
        for i in range(count):
            self._compute_windows(n, T, stride)
            self._steps(self._drawn[i : i + 1])

    def _fill_by_length(self, slots: Ints, lengths: Ints) -> None:
        """Computes the first positions of slots, those of similar lengths together."""
        padded = self._padded[lengths]
        for T in sorted(set(padded.tolist())):
            if T > 0:
                self._fill(slots[padded == T], T, 0)

    def _fill(self, slots: Ints, T: int, stride: int) -> None:
        """Computes the first T positions of slots, whose windows move by `stride` tokens first."""
        most = self._at_once(T)
        for first in range(0, len(slots), most):
            n = self._list(slots[first : first + most])
            key = ("windows", n, T, stride)
            self._run(key, key, functools.partial(self._compute_windows, n, T, stride))

    def _at_once(self, T: int) -> int:
        """Returns for how many slots T positions are computed together."""
        return 1 << max(1, FILL_ROWS // T).bit_length() - 1

    def _list(self, slots: Ints) -> int:
        """Puts the slots whose windows come next into `_members`; returns the number of places."""
        n = min(slots_bucket(len(slots)), self.shape.slots)
        listed = np.full(n, -1)
        listed[: len(slots)] = slots
        if not self._listed.startswith(listed.tobytes()):
            self._members[:n] = self._uploaded(listed)
            self._listed = listed.tobytes()
        return n

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
        """Returns a linear layer without 8-bit weights, which operators of training cannot read.

        Products of many rows take longer than this copy, and the next layer reuses its memory.
        """
        weight, bias = linear
        if isinstance(weight, Int8Weight):
            weight = weight.dense(self.weights.dtype)
        return weight, bias

    def _run(self, key: Any, warmed_by: Any, function: Callable[[], None]) -> None:
        """Calls a function the first time, so that its kernels compile; later replays its graph.

        Args:
            key: The key of its graph.
            warmed_by: The key of the first call; functions with the same kernels share it.
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
        with captured(graph, self._pool, stream):
            function()
        return graph

    def _uploaded(self, *arrays: Ints) -> Tensor:
        """Copies arrays of int64 to the device, one after the other."""
        cuda = self._state.is_cuda
        size = sum(map(len, arrays))
        host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=cuda)
        np.concatenate(arrays, out=host.numpy())
        return host.to(self._state.device, non_blocking=True)
