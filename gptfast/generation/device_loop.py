"""Generation on a GPU: the host gives slots to sequences, queues steps, and reads what they drew.

While queued steps run, the host reads the results of the steps before them, so the device does not
wait for the host. The host knows beforehand how many tokens each slot draws until its sequence has
its full length, and gives slots to the next sequences without polling. It notices a sequence that
ends at a stop only when it polls, and drops what the slot has drawn since. Draws come from
counters, so no result depends on when the host polls.

The host handles tokens and slots as whole arrays, because a step of a thousand slots takes a tenth
of a millisecond.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from gptfast.generation.decoder import (
    FLIGHTS,
    MOST_STEPS,
    Decoder,
    InFlight,
    Ints,
    Shape,
    Starts,
    StepRun,
)
from gptfast.generation.dtypes import activations
from gptfast.generation.kept import keep_decoder, take_decoder
from gptfast.generation.request import Request, slots_at_once
from gptfast.generation.sequences import Sequences, Update
from gptfast.generation.sizes import capacity_bucket, slots_bucket
from gptfast.model import GPT
from gptfast.ops.sampling import top_logprobs
from gptfast.ops.triton.launch import precision
from gptfast.ops.triton.sampling import kind_of

POLL_SECONDS = 0.0025  # most seconds between polls: of steps that are queued and read together
POLL_SHARE = 4  # without stops, poll every `seconds / POLL_SHARE` of a run if that is longer
POLL_STEPS = 8  # fewest steps that are queued together
MOST_SLOTS = 4096  # unless the request says otherwise; more would not be faster


class _Queued(NamedTuple):
    """Queued steps, and the sequences that they draw for."""

    flight: InFlight
    owners: Ints  # (S,), the sequence of each slot
    counts: Ints  # (S,), how many tokens each slot draws


class DeviceLoop:
    """Generates on the model's device, as many sequences at once as the memory allows.

    See sequences.GenerationLoop. Letters: n sequences, S slots.
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
        running = self._sequences.running()
        self._waiting = np.fromiter(running, np.int64, len(running))
        self._unfinished = len(self._waiting)
        self._stops = bool(self._sequences.stop_tokens or request.stop_strings)
        self._queued: deque[_Queued] = deque()
        self._poll_seconds = POLL_SECONDS
        self._decoder: Decoder | None = None
        slots = 0
        if self._unfinished:
            shape = self._shape(lasting)
            with torch.cuda.device_of(model.wte.weight):
                self._decoder = take_decoder(model, shape, request.sampling)
            slots = shape.slots
        self._allowed = min(slots, request.max_batch or slots)
        # The state of each slot after all queued steps.
        self._owners = np.full(slots, -1)
        self._lengths = np.zeros(slots, np.int64)  # of the window
        self._left = np.zeros(slots, np.int64)  # tokens still to be drawn

    def _shape(self, lasting: bool) -> Shape:
        request, config = self._request, self._config
        weight = self._model.wte.weight
        longest = max(map(len, request.prompts)) + request.max_new_tokens
        layers = config.n_layer if config.attention else 0
        dtype = activations(weight.dtype, request.dtype, weight.device.type)
        token_bytes = 2 * layers * config.n_embd * dtype.itemsize
        needed = max(1, min(config.block_size, longest - 1))
        capacity = capacity_bucket(needed, config.block_size)
        fitting = slots_at_once(request, MOST_SLOTS, needed, needed * token_bytes)
        if fitting * capacity * token_bytes > request.max_cache_bytes:
            capacity = needed
        rounded = slots_bucket(fitting)
        if rounded * capacity * token_bytes > request.max_cache_bytes:
            rounded = fitting
        kind = kind_of(request.sampling, config.vocab_size)
        return Shape(config, request.dtype, lasting, rounded, capacity, kind, precision(dtype))

    @property
    def _own_decoder(self) -> Decoder:
        assert self._decoder is not None
        return self._decoder

    def run(self, seconds: float) -> bool:
        """See sequences.GenerationLoop."""
        if self._decoder is None:
            return False
        end = perf_counter() + seconds
        one_by_one = seconds <= 0.0 or self._request.top_logprobs > 0
        ahead = 1 if one_by_one else FLIGHTS - 1 if self._stops else FLIGHTS
        self._poll_seconds = POLL_SECONDS
        if not self._stops:
            self._poll_seconds = max(POLL_SECONDS, seconds / POLL_SHARE)
        device = self._decoder.device
        with torch.cuda.device(device if device.type == "cuda" else -1), _no_autocast(device.type):
            self._decoder.order.begin()
            try:
                while self._unfinished:
                    while len(self._queued) < ahead and self._queue(one_by_one):
                        pass
                    self._poll()
                    if perf_counter() >= end:
                        break
            finally:
                self._decoder.order.end()
        if self._unfinished:
            return True
        self._queued.clear()  # of sequences that have ended at stops
        keep_decoder(self._model, self._decoder)
        self._decoder = None
        return False

    def updates(self) -> list[Update]:
        """See sequences.GenerationLoop."""
        return self._sequences.updates()

    def _queue(self, one_by_one: bool) -> bool:
        """Queues steps and notes the slots' state after them; False if no steps are needed."""
        self._fill_slots()
        running = self._left[self._left > 0]
        if not len(running):
            return False
        # If sequences wait for a slot, only until the first slot becomes free.
        left = int(running.min() if len(self._waiting) else running.max())
        steps = 1 if one_by_one else min(left, self._steps_per_poll(left))
        owners, counts = self._owners.copy(), np.minimum(self._left, steps)
        flight = self._own_decoder.queue(self._step_runs(steps))
        self._queued.append(_Queued(flight, owners, counts))
        self._owners[self._left == 0] = -1
        return True

    def _steps_per_poll(self, left: int) -> int:
        """Returns how many of the steps that are left to queue at once.

        Near the end it is half of them, because no queued step hides the time in which the host
        makes lists of the last results.
        """
        timely = int(self._poll_seconds / self._own_decoder.step_seconds)
        half = max(left // 2 + POLL_STEPS - 1, 2 * POLL_STEPS)
        return max(1, min(timely, MOST_STEPS, half) // POLL_STEPS) * POLL_STEPS

    def _fill_slots(self) -> None:
        """Gives free slots to sequences that wait."""
        if not len(self._waiting):
            return
        slots = np.flatnonzero(self._owners[: self._allowed] < 0)[: len(self._waiting)]
        if not len(slots):
            return
        request = self._request
        chosen, self._waiting = np.split(self._waiting, [len(slots)])
        listed = chosen.tolist()
        prompts = [request.prompts[i] for i in listed]
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        texts = np.fromiter(chain.from_iterable(prompts), np.int64, int(lengths.sum()))
        limits = _of(self._sequences.limits, listed)
        stride = request.stride or 1
        over = np.maximum(lengths - self._config.block_size, 0)
        offsets = -(-over // stride) * stride
        seeds, sequence_ids = _of(request.seeds, listed), _of(request.sequence_ids, listed)
        self._own_decoder.start(Starts(slots, texts, lengths, offsets, limits, seeds, sequence_ids))
        self._owners[slots], self._left[slots] = chosen, limits
        self._lengths[slots] = lengths - offsets

    def _step_runs(self, steps: int) -> Iterator[StepRun]:
        """Divides steps where windows move, and counts what the slots draw.

        A window that is longer than block_size moves before its slot takes a step. With a stride
        of 1 it moves before every step from then on.
        """
        size, stride = self._config.block_size, self._request.stride or 0
        taken = np.minimum(self._left, steps)
        if stride == 0 or int((self._lengths + taken).max()) <= size + 1:
            self._left -= taken
            self._lengths += taken
            yield StepRun(steps)
            return
        while steps > 0:
            # Steps of each slot until its window must move; no limit if it ends before that.
            room = size + 1 - self._lengths
            room[self._left <= room] = MOST_STEPS
            moving = None
            if int(room.min()) <= 0:
                (moving,) = np.nonzero(room <= 0)
                over = self._lengths[moving] - size
                self._lengths[moving] -= -(-over // stride) * stride
                room[moving] = MOST_STEPS if stride == 1 else size + 1 - self._lengths[moving]
            count = min(steps, int(room.min()))
            yield StepRun(count, moving, stride, each=stride == 1 and moving is not None)
            taken = np.minimum(self._left, count)
            self._left -= taken
            self._lengths += taken
            if moving is not None and stride == 1:
                self._lengths[moving] = size + 1
            steps -= count

    def _poll(self) -> None:
        """Reads the oldest queued steps, and appends what they drew."""
        flight, owners, counts = self._queued.popleft()
        tokens, logprobs = self._own_decoder.read(flight)
        (slots,) = np.nonzero(counts)
        sequences, states = owners[slots].tolist(), self._sequences.states
        if self._stops:
            slots = slots[[states[i] == "running" for i in sequences]]
            sequences = owners[slots].tolist()
        counts = counts[slots]
        if np.isnan(logprobs).any():
            self._append_until_not_finite(slots, sequences, counts, tokens, logprobs)
        else:
            self._append(slots, sequences, counts, tokens, logprobs)
        ended = [states[i] != "running" for i in sequences]
        self._unfinished -= sum(ended)
        if self._stops:
            slots = slots[ended]
            slots = slots[self._owners[slots] == owners[slots]]
            self._owners[slots], self._left[slots] = -1, 0

    def _append(
        self, slots: Ints, sequences: list[int], counts: Ints, tokens: Any, logprobs: Any
    ) -> None:
        """Appends the first tokens of slots, `counts` of each, to sequences."""
        drawn, values = tokens[slots].tolist(), logprobs[slots].tolist()
        for n in np.flatnonzero(counts < tokens.shape[1]).tolist():
            del drawn[n][counts[n] :], values[n][counts[n] :]
        likeliest = None
        if self._request.top_logprobs:
            logits = self._own_decoder.logits(slots)  # of the only step
            found = top_logprobs(logits.double().log_softmax(-1), self._request.top_logprobs)
            likeliest = [[each] for each in found]
        suspects = None
        if self._stops and not self._request.stop_strings:
            stops = np.isin(tokens[slots], self._sequences.stop_tokens).any(1)
            suspects = np.flatnonzero(stops).tolist()
        self._sequences.extend(sequences, drawn, values, likeliest, suspects)

    def _append_until_not_finite(
        self, slots: Ints, sequences: list[int], counts: Ints, tokens: Any, logprobs: Any
    ) -> None:
        """Appends what was drawn from finite logits; raises if a sequence needs more than that."""
        wrong = np.isnan(logprobs[slots])  # (n, steps)
        finite = np.where(wrong.any(1), wrong.argmax(1), wrong.shape[1])
        self._append(slots, sequences, np.minimum(counts, finite), tokens, logprobs)
        states = self._sequences.states
        for n in np.argsort(sequences).tolist():
            if finite[n] < counts[n] and states[sequences[n]] == "running":
                raise self._sequences.not_finite(sequences[n])


def _of(values: list[int], places: list[int]) -> Ints:
    chosen = values if len(places) == len(values) else [values[i] for i in places]
    return np.array(chosen, np.int64)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Turns autocast off: it would change a prefill's dtype, but not a captured decode step's."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
