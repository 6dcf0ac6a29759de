"""Generation on a GPU: the host gives slots to sequences, queues steps, and reads what they drew.

While queued steps run, the host looks at the results of those before them, so the device does not
wait for it. A sequence that ends at a stop is found at the look; what its slot has drawn since is
dropped. Draws come from counters, so no result depends on when the host looks.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from gptfast.generation.decoder import (
    MOST_STEPS,
    UNROLLED,
    Decoder,
    Flight,
    Shape,
    Start,
    capacity_bucket,
    slots_bucket,
)
from gptfast.generation.kept import keep_decoder, take_decoder
from gptfast.generation.request import Request, slots_at_once
from gptfast.generation.sequences import Sequence, Sequences, Update
from gptfast.generation.weights import FLOATS
from gptfast.model import GPT
from gptfast.ops.sampling import top_logprobs
from gptfast.ops.triton.sampling import kind_of

LOOK_SECONDS = 0.0025  # of queued steps; as many are queued behind them


@dataclass
class _Slot:
    """A sequence's slot, and how far it will be when all queued steps are done."""

    index: int
    sequence: Sequence
    length: int  # of the window
    left: int  # tokens still to be drawn


class DeviceLoop:
    """Generates on the model's device, as many sequences at once as the memory allows.

    See sequences.Loop.
    """

    def __init__(self, model: GPT, request: Request, lasting: bool = False) -> None:
        """Reserves the caches.

        Args:
            model: The GPT, of plain layers.
            request: What to generate.
            lasting: Whether the model may change before the loop is done.
        """
        self._model, self._request, self._config = model, request, model.config
        self._sequences = Sequences(request, model.config.block_size)
        self._sequences.slide_windows()
        self._waiting = deque(self._sequences.running())
        self._slots: dict[int, _Slot] = {}
        self._flights: deque[tuple[Flight, list[_Slot], float]] = deque()
        self._steps, self._looked_at = 1, 0.0
        self._decoder: Decoder | None = None
        self._free: list[int] = []
        if self._waiting:
            shape = self._shape(lasting)
            with torch.cuda.device_of(model.wte.weight):
                self._decoder = take_decoder(model, shape, request.sampling)
            allowed = min(shape.slots, request.max_batch)
            self._free = list(range(allowed))[::-1]

    def _shape(self, lasting: bool) -> Shape:
        request, config = self._request, self._config
        weight = self._model.wte.weight
        longest = max(map(len, request.prompts)) + request.max_new_tokens
        layers = config.n_layer if config.attention else 0
        dtype = FLOATS[request.dtype] if request.dtype else weight.dtype
        token_bytes = 2 * layers * config.n_embd * dtype.itemsize

        def slots(capacity: int) -> int:
            sizes = capacity, capacity * token_bytes
            return slots_at_once(request, len(request.prompts), *sizes)

        needed = max(1, min(config.block_size, longest - 1))
        capacity, fitting = capacity_bucket(needed, config.block_size), slots(needed)
        if fitting * capacity * token_bytes > request.max_cache_bytes:
            capacity = needed
        rounded = slots_bucket(fitting)
        if rounded * capacity * token_bytes > request.max_cache_bytes:
            rounded = fitting
        kind = kind_of(request.sampling, config.vocab_size)
        return Shape(config, request.dtype, lasting, rounded, capacity, kind)

    @property
    def _own_decoder(self) -> Decoder:
        assert self._decoder is not None
        return self._decoder

    def run(self, seconds: float) -> bool:
        """See sequences.Loop."""
        if self._decoder is None:
            return False
        end = time.perf_counter() + seconds
        ahead = 1 if seconds > 0.0 and not self._request.top_logprobs else 0
        weight = self._model.wte.weight
        # Autocast would lower the dtype of a prefill, but not that of a captured decode step.
        with torch.cuda.device_of(weight), torch.autocast(weight.device.type, enabled=False):
            while True:
                self._fill_slots()
                if seconds > 0.0:
                    self._steps = max(self._steps, UNROLLED)
                queued = self._queue()
                if not self._flights:
                    break
                if len(self._flights) > ahead or not queued:
                    self._look()
                    if time.perf_counter() >= end:
                        break
        more = bool(self._slots or self._waiting)
        if not more:
            keep_decoder(self._model, self._decoder)
            self._decoder = None
        return more

    def updates(self) -> list[Update]:
        """See sequences.Loop."""
        return self._sequences.updates()

    def _fill_slots(self) -> None:
        starts = []
        while self._waiting and self._free:
            each = self._waiting.popleft()
            slot = self._free.pop()
            limit = self._request.max_new_tokens
            self._slots[slot] = _Slot(slot, each, each.window_length, limit)
            start = slot, each.window, each.offset, limit, each.seed, each.sequence_id, each.tokens
            starts.append(Start(*start))
        if starts:
            self._own_decoder.start(starts)

    def _queue(self) -> bool:
        """Queues steps, as many as the sequences need, and takes note of how far they will be."""
        needed = [self._steps_left(each) for each in self._slots.values()]
        needed = [count for count in needed if count]
        if not needed:
            return False
        if self._request.top_logprobs:
            steps = 1
        else:
            # Where others wait for a slot, up to the first that becomes free.
            steps = min(self._steps, min(needed) if self._waiting else max(needed))
        owners = list(self._slots.values())
        flight = self._own_decoder.queue(steps, self._before_steps)
        self._flights.append((flight, owners, time.perf_counter()))
        return True

    def _steps_left(self, slot: _Slot) -> int:
        if self._request.stride is not None:
            return slot.left
        return max(0, min(slot.left, self._config.block_size - slot.length + 1))

    def _before_steps(self, wanted: int) -> int:
        """Slides windows that are too long, and returns how many steps are to follow at once.

        These may be more than wanted: a slot that has drawn all its tokens stands still.
        """
        size, stride = self._config.block_size, self._request.stride
        running = [each for each in self._slots.values() if self._steps_left(each)]
        count = UNROLLED if wanted >= UNROLLED // 2 else 1
        if stride is not None:
            over = [each for each in running if each.length > size]
            if over:
                self._own_decoder.slide([each.index for each in over], stride)
                for each in over:
                    each.length -= -(-(each.length - size) // stride) * stride
            if any(each.length + count > size + 1 for each in running):
                count = 1
        for each in running:
            steps = min(count, self._steps_left(each))
            each.length += steps
            each.left -= steps
        return count

    def _look(self) -> None:
        """Reads the oldest queued steps, and appends what they drew."""
        flight, owners, queued_at = self._flights.popleft()
        tokens, logprobs = self._own_decoder.read(flight)
        now = time.perf_counter()
        each_step = (now - max(queued_at, self._looked_at)) / flight.steps
        self._looked_at = now
        most = max(1, min(MOST_STEPS, int(LOOK_SECONDS / max(each_step, 1e-9))))
        self._steps = min(most, 2 * self._steps)
        running = [each for each in owners if each.sequence.state == "running"]
        if self._request.top_logprobs:
            self._append_with_likeliest(running, tokens, logprobs)
        else:
            self._append(running, tokens, logprobs)
        if self._request.stride is None:
            self._sequences.slide_windows()
        for each in running:
            if each.sequence.state != "running" and self._slots.get(each.index) is each:
                del self._slots[each.index]
                self._free.append(each.index)

    def _append(self, running: list[_Slot], tokens: "np.ndarray", logprobs: "np.ndarray") -> None:
        finite = not np.isnan(logprobs).any()
        columns, values = tokens.tolist(), logprobs.tolist()
        for each in sorted(running, key=lambda each: each.sequence.index):
            drawn, own = columns[each.index], values[each.index]
            if drawn[-1] < 0:
                drawn = drawn[: drawn.index(-1)]
                own = own[: len(drawn)]
            if finite or not np.isnan(own).any():
                self._sequences.extend(each.sequence, drawn, own)
                continue
            first = next(i for i, value in enumerate(own) if value != value)
            self._sequences.extend(each.sequence, drawn[:first], own[:first])
            if each.sequence.state == "running":
                raise self._sequences.not_finite(each.sequence)

    def _append_with_likeliest(
        self, running: list[_Slot], tokens: "np.ndarray", logprobs: "np.ndarray"
    ) -> None:
        drawing = [each for each in running if tokens[each.index, 0] >= 0]
        if not drawing:
            return
        logits = self._own_decoder.logits([each.index for each in drawing])
        likeliest = top_logprobs(logits.double().log_softmax(-1), self._request.top_logprobs)
        for each, own in sorted(
            zip(drawing, likeliest, strict=True), key=lambda pair: pair[0].sequence.index
        ):
            logprob = float(logprobs[each.index, 0])
            if logprob != logprob:
                raise self._sequences.not_finite(each.sequence)
            self._sequences.append(each.sequence, int(tokens[each.index, 0]), logprob, own)
