"""Generation on a GPU: static caches of keys and values, and a decode step as one CUDA graph.

Letters: S slots of the cache, n of them in a call, T time, C n_embd, H heads, D head_dim,
V vocab_size, L layers.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.generation.request import Request, slots_at_once
from gptfast.generation.sequences import Sequence, Sequences, Update, by_window_length
from gptfast.generation.snapshot import snapshot
from gptfast.model import GPT
from gptfast.modules import Attend, ForwardContext
from gptfast.ops.sampling import Sampling, top_logprobs
from gptfast.ops.triton.decode import decode_attention
from gptfast.ops.triton.sampling import sample

WARM_UPS = 3  # decode steps before the capture: they compile, choose configurations, allocate
INFERENCE = ForwardContext(ops, dropout_p=0.0, seed=None)


class DeviceLoop:
    """Generates on the model's device, as many sequences at once as the memory allows.

    A sequence that is new, or whose window has moved, is prefilled, together with the others whose
    windows have its length; the rest are decoded from their caches. See sequences.Loop.
    """

    def __init__(self, model: GPT, request: Request, lasting: bool = False) -> None:
        """Reserves the caches.

        Args:
            model: The GPT, of plain layers.
            request: What to generate.
            lasting: Whether the model may change before the loop is done.
        """
        self._model = _fixed(model, request.dtype, lasting)
        self._request = request
        config = self._model.config
        self._sequences = Sequences(request, config.block_size)
        longest = max(map(len, request.prompts), default=0) + request.max_new_tokens
        capacity = max(1, min(config.block_size, longest - 1))
        layers = config.n_layer if config.attention else 0
        slot_bytes = 2 * layers * config.n_embd * capacity * self._model.wte.weight.itemsize
        slots = slots_at_once(request, len(request.prompts), capacity, slot_bytes)
        self._free_slots = list(range(slots))[::-1]
        self._slots: dict[int, int] = {}  # by the index of the sequence that has it
        self._cached_offsets: dict[int, int] = {}  # where the window starts that its slot holds
        if slots:
            self._decoder = Decoder(self._model, slots, capacity, request.sampling)

    def run(self, seconds: float) -> bool:
        """Generates one token for every sequence that has a slot; see sequences.Loop."""
        weight = self._model.wte.weight
        # Autocast would lower the dtype of a prefill, but not that of a captured decode step.
        with torch.cuda.device_of(weight), torch.autocast(weight.device.type, enabled=False):
            self._sequences.slide_windows()
            self._generate(self._with_slots(self._sequences.running()))
        return bool(self._sequences.running())

    def updates(self) -> list[Update]:
        """See sequences.Loop."""
        return self._sequences.updates()

    def _with_slots(self, running: list[Sequence]) -> list[Sequence]:
        """The sequences that have a slot, after those that ended have handed on theirs."""
        for index in set(self._slots).difference(each.index for each in running):
            self._free_slots.append(self._slots.pop(index))
        for each in running:
            if each.index not in self._slots and self._free_slots:
                self._slots[each.index] = self._free_slots.pop()
        return [each for each in running if each.index in self._slots]

    def _generate(self, active: list[Sequence]) -> None:
        cached = [each for each in active if self._cached_offsets.get(each.index) == each.offset]
        new = [each for each in active if self._cached_offsets.get(each.index) != each.offset]
        if cached:  # before any prefill, because a decode step writes into all slots
            self._decode(cached)
        for group in by_window_length(new):
            self._prefill(group)

    def _decode(self, group: list[Sequence]) -> None:
        slots = self._prepared_slots(group)
        positions = [each.window_length - 1 for each in group]
        self._decoder.decode(slots, [each.tokens[-1] for each in group], positions)
        self._append_drawn(group, slots)

    def _prefill(self, group: list[Sequence]) -> None:
        for each in group:
            self._decoder.mark_seen(self._slots[each.index], each.tokens)
            self._cached_offsets[each.index] = each.offset
        slots = self._prepared_slots(group)
        self._decoder.prefill(slots, [each.window for each in group])
        self._append_drawn(group, slots)

    def _prepared_slots(self, group: list[Sequence]) -> list[int]:
        """The slots of these sequences, which know from here on what they draw next."""
        slots = [self._slots[each.index] for each in group]
        self._decoder.set_draws(
            slots,
            [each.seed for each in group],
            [each.sequence_id for each in group],
            [each.generated_length for each in group],
        )
        return slots

    def _append_drawn(self, group: list[Sequence], slots: list[int]) -> None:
        drawn = self._decoder.drawn(slots, self._request.top_logprobs)
        for each, (token, logprob, likeliest) in zip(group, drawn, strict=True):
            if not math.isfinite(logprob):
                raise self._sequences.not_finite(each)
            self._sequences.append(each, token, logprob, likeliest)


def _fixed(model: GPT, dtype: str | None, lasting: bool) -> GPT:
    """The model itself where it has the dtype and does not change meanwhile, else a snapshot."""
    own = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(model.wte.weight.dtype)
    shared = dtype in (None, own) and not lasting
    return model if shared else snapshot(model, dtype)


def logits_columns(vocab_size: int) -> int:
    """Rounds the columns of logits up to a multiple of 16, which aligns every row."""
    return -(-vocab_size // 16) * 16


class Decoder:
    """Keys and values of S slots, and the decode step that gives each slot its next token.

    No tensor moves or changes its shape, so that a CUDA graph can replay the step.
    """

    def __init__(self, model: GPT, slots: int, capacity: int, sampling: Sampling) -> None:
        config, weight = model.config, model.wte.weight
        self._model, self._sampling = model, sampling
        self._tokens, self._positions, self._seeds, self._sequence_ids, self._steps, self._next = (
            torch.zeros(slots, dtype=torch.int64, device=weight.device) for _ in range(6)
        )
        columns = logits_columns(config.vocab_size)  # -inf past the vocabulary is never drawn
        self._padded_logits = torch.zeros(slots, columns, device=weight.device)
        self._padded_logits[:, config.vocab_size :] = -torch.inf
        self._logits = self._padded_logits[:, : config.vocab_size]
        self._logprobs = torch.zeros(slots, device=weight.device)
        self._seen = torch.zeros(slots, columns, dtype=torch.uint8, device=weight.device)
        shape = config.n_layer, slots, 2, config.n_head, capacity, config.head_dim
        self._cache = weight.new_zeros(shape if config.attention else 0)  # (L, S, 2, H, ., D)
        self._graph: Any = None

    def mark_seen(self, slot: int, tokens: list[int]) -> None:
        """Makes the repetition penalty apply to these tokens of a slot and to no others."""
        if self._sampling.repetition_penalty != 1.0:
            self._seen[slot] = 0
            self._seen[slot, self._on_device(tokens)] = 1

    def set_draws(
        self, slots: list[int], seeds: list[int], sequence_ids: list[int], steps: list[int]
    ) -> None:
        """Sets which random number each of these slots draws next; see ops.sampling.draws."""
        at = self._on_device(slots)
        self._seeds[at] = self._on_device(seeds)
        self._sequence_ids[at] = self._on_device(sequence_ids)
        self._steps[at] = self._on_device(steps)

    @torch.no_grad()
    def prefill(self, slots: list[int], windows: list[list[int]]) -> None:
        """Fills the caches of n slots with n windows of one length, and draws the next tokens."""
        at, idx = self._on_device(slots), self._on_device(windows)  # (n,), (n, T)
        T = idx.shape[1]

        def attend_in(layer: int) -> Attend:
            def attend(qkv: Tensor, n_head: int) -> Tensor:
                heads = qkv.unflatten(-1, (3, n_head, -1)).permute(0, 2, 3, 1, 4)  # (n, 3, H, T, D)
                self._cache[layer, at, :, :, :T] = heads[:, 1:]
                return ops.causal_attention(*heads.unbind(1)).transpose(1, 2).flatten(2)

            return attend

        x = self._model.embed(idx, INFERENCE)  # (n, T, C)
        for layer, block in enumerate(self._model.blocks):
            x = block.forward_with(attend_in(layer), x, INFERENCE)
        self._logits[at] = self._logits_of(x[:, -1])
        self._sample()

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> None:
        """Draws the token after one new token in each of n slots; overwrites all others' draws.

        Args:
            slots: n slots; the others' caches are overwritten at position 0, too.
            tokens: The new token of each.
            positions: The place of each new token in its window.
        """
        at, newest = self._on_device(slots), self._on_device(tokens)
        self._tokens.zero_()
        self._positions.zero_()
        self._tokens[at], self._positions[at] = newest, self._on_device(positions)
        if self._sampling.repetition_penalty != 1.0:
            self._seen[at, newest] = 1
        if self._tokens.is_cuda and self._graph is None:
            self._capture()
        if self._graph is None:
            self._decode_step()
        else:
            self._graph.replay()

    def drawn(self, slots: list[int], count: int) -> list[tuple[int, float, Any]]:
        """Returns what the last prefill or decode drew for n slots.

        Returns:
            Per slot, the token, its log-probability (NaN where the logits are not finite), and the
            `count` likeliest tokens with theirs.
        """
        at = self._on_device(slots)
        finite = self._logits[at].isfinite().all(1)
        logprobs = self._logprobs[at].double().where(finite, torch.nan)
        # One transfer for both, because each would wait for the device.
        tokens, values = torch.stack([self._next[at].double(), logprobs]).tolist()
        likeliest: list[list[tuple[int, float]]] = [[] for _ in slots]
        if count:
            likeliest = top_logprobs(self._logits[at].double().log_softmax(-1), count)
        return list(zip(map(int, tokens), values, likeliest, strict=True))

    def _capture(self) -> None:
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UPS):
                self._decode_step()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        # torch's default capture stream belongs to the first device that the process captured on.
        with torch.cuda.graph(self._graph, stream=side_stream):
            self._decode_step()

    @torch.no_grad()
    def _decode_step(self) -> None:
        model = self._model
        slots = torch.arange(len(self._tokens), device=self._tokens.device)
        lengths = self._positions + 1

        def attend_in(layer: int) -> Attend:
            def attend(qkv: Tensor, n_head: int) -> Tensor:
                q, kv = qkv.flatten(0, 1).tensor_split([model.config.n_embd], dim=1)
                new = kv.unflatten(1, (2, n_head, -1))  # (S, 2, H, D)
                self._cache[layer].transpose(1, 3)[slots, self._positions] = new.transpose(1, 2)
                return decode_attention(q, self._cache[layer], lengths)[:, None]

            return attend

        x = F.embedding(self._tokens, model.wte.weight)
        x = (x + F.embedding(self._positions, model.wpe.weight))[:, None]  # (S, 1, C)
        for layer, block in enumerate(model.blocks):
            x = block.forward_with(attend_in(layer), x, INFERENCE)
        self._logits.copy_(self._logits_of(x[:, 0]))
        self._sample()

    def _logits_of(self, x: Tensor) -> Tensor:
        """x (n, C) -> (n, V) float32."""
        norm, head = self._model.ln_f, self._model.lm_head
        return ops.layer_norm_linear(x, norm.weight, norm.bias, head.weight, None).float()

    def _sample(self) -> None:
        sample(
            self._sampling, self._padded_logits, self._seen, self._seeds, self._sequence_ids,
            self._steps, self._next, self._logprobs,
        )  # fmt: skip

    def _on_device(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._tokens.device)
