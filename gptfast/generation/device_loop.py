"""Generation on a GPU: keys and values in static caches, a step of all rows as one CUDA graph.

Letters: R rows that run at once, T time, C n_embd, H heads, D head_dim, V vocab_size, L layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.generation.reference_loop import ReferenceLoop, likeliest_tokens, reference_model
from gptfast.generation.request import Request, not_finite, slots_at_once
from gptfast.model import GPT
from gptfast.modules import Attend, Step
from gptfast.ops.sampling import Sampling
from gptfast.ops.triton.decode import decode_attention
from gptfast.ops.triton.sampling import sample

WARM_UPS = 3  # steps before one is captured: they compile, choose configurations, allocate


class DeviceLoop(ReferenceLoop):
    """The sequences of a request on the model's device, as many at once as the memory allows.

    A sequence that is new, or whose window has moved, is computed as a whole, together with those
    of its length; the others take a token each from their caches.
    """

    def __init__(self, model: GPT, request: Request, lasting: bool = False) -> None:
        self._lasting = lasting
        super().__init__(model, request)
        config = self._model.config
        longest = max((len(tokens) for tokens in self._tokens), default=0) + request.max_new_tokens
        capacity = max(1, min(config.block_size, longest - 1))
        layers = config.n_layer if config.attention else 0
        row = 2 * layers * config.n_embd * capacity * self._model.wte.weight.itemsize
        rows = slots_at_once(request, len(self._tokens), capacity, row)
        self._free = list(range(rows))[::-1]
        self._row: dict[int, int] = {}
        self._start: dict[int, int] = {}  # where the window starts that a row has the cache of
        if rows:
            self._decoder = Decoder(self._model, rows, capacity, request.sampling)

    def _prepared(self, model: GPT, dtype: str | None) -> GPT:
        """The model itself where it has the dtype and nothing changes it meanwhile."""
        own = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(model.wte.weight.dtype)
        shared = dtype in (None, own) and not self._lasting
        return model if shared else reference_model(model, dtype)

    def run(self, seconds: float) -> bool:
        """One token for every sequence that has a row; see Loop."""
        weight = self._model.wte.weight
        # Autocast would lower what is computed as a whole, and leave the steps from the cache.
        with torch.cuda.device_of(weight), torch.autocast(weight.device.type, enabled=False):
            return super().run(seconds)

    def _advance(self, running: list[int]) -> None:
        for i in set(self._row).difference(running):
            self._free.append(self._row.pop(i))
        for i in running:
            if i not in self._row and self._free:
                self._row[i] = self._free.pop()
        active = [i for i in running if i in self._row]
        new = [i for i in active if self._start.get(i) != self._offset[i]]
        known = [i for i in active if self._start.get(i) == self._offset[i]]
        if known:  # first: it writes to the other rows, too
            self._decode(known)
        lengths = np.array([len(self._window(i)) for i in new])
        for length in np.unique(lengths):
            self._prefill([new[n] for n in np.flatnonzero(lengths == length)])

    def _decode(self, group: list[int]) -> None:
        rows, tokens = self._rows(group), [self._tokens[i][-1] for i in group]
        self._draw_from(group)
        self._decoder.decode(rows, tokens, [len(self._window(i)) - 1 for i in group])
        self._take(group)

    def _prefill(self, group: list[int]) -> None:
        for i in group:
            self._decoder.mark_seen(self._row[i], self._tokens[i])
            self._start[i] = self._offset[i]
        self._draw_from(group)
        self._decoder.prefill(self._rows(group), [self._window(i) for i in group])
        self._take(group)

    def _rows(self, group: list[int]) -> list[int]:
        return [self._row[i] for i in group]

    def _draw_from(self, group: list[int]) -> None:
        request = self._request
        self._decoder.draw_from(
            self._rows(group),
            [request.seeds[i] for i in group],
            [request.numbers[i] for i in group],
            [self._generated(i) for i in group],
        )

    def _take(self, group: list[int]) -> None:
        drawn = self._decoder.drawn(self._rows(group), self._request.alternatives)
        for i, (token, logprob, alternatives) in zip(group, drawn, strict=True):
            if not math.isfinite(logprob):
                raise not_finite("prompt", i // self._request.num_samples)
            self._append(i, token, logprob, alternatives)


def logits_columns(vocab_size: int) -> int:
    """Columns of a row of logits with which every row is read by 16 bytes."""
    return -(-vocab_size // 16) * 16


class Decoder:
    """R rows of keys and values, and the step that gives each its next token.

    All tensors keep their places, so that a step can be a CUDA graph.
    """

    def __init__(self, model: GPT, rows: int, capacity: int, sampling: Sampling) -> None:
        config, weight = model.config, model.wte.weight
        self._model, self._sampling = model, sampling
        self._tokens, self._positions, self._seeds, self._numbers, self._steps, self._next = (
            torch.zeros(rows, dtype=torch.int64, device=weight.device) for _ in range(6)
        )
        columns = logits_columns(config.vocab_size)  # those past the vocabulary are never drawn
        self._scores = torch.zeros(rows, columns, device=weight.device)
        self._scores[:, config.vocab_size :] = -torch.inf
        self._logits = self._scores[:, : config.vocab_size]
        self._logprobs = torch.zeros(rows, device=weight.device)
        self._seen = torch.zeros(rows, columns, dtype=torch.uint8, device=weight.device)
        shape = config.n_layer, rows, 2, config.n_head, capacity, config.head_dim
        self._cache = weight.new_zeros(shape if config.attention else 0)
        self._graph: Any = None

    def mark_seen(self, row: int, tokens: Sequence[int]) -> None:
        """Has the repetition penalty apply to these tokens of a row alone."""
        if self._sampling.repetition_penalty != 1.0:
            self._seen[row] = 0
            self._seen[row, self._on_device(tokens)] = 1

    def draw_from(
        self, rows: list[int], seeds: list[int], numbers: list[int], steps: list[int]
    ) -> None:
        """Says which random number each of these rows draws next."""
        at = self._on_device(rows)
        for own, values in ((self._seeds, seeds), (self._numbers, numbers), (self._steps, steps)):
            own[at] = self._on_device(values)

    @torch.no_grad()
    def prefill(self, rows: list[int], windows: list[list[int]]) -> None:
        """Draws the token after windows of one length, whose keys and values the rows then keep."""
        at, idx = self._on_device(rows), self._on_device(windows)
        step, T = Step(ops, 0.0, None), idx.shape[1]

        def attend_in(layer: int) -> Attend:
            def attend(qkv: Tensor, n_head: int) -> Tensor:
                heads = qkv.unflatten(-1, (3, n_head, -1)).permute(0, 2, 3, 1, 4)  # (n, 3, H, T, D)
                self._cache[layer, at, :, :, :T] = heads[:, 1:]
                return ops.causal_attention(*heads.unbind(1)).transpose(1, 2).flatten(2)

            return attend

        x = self._model.embed(idx, step)
        for layer, block in enumerate(self._model.blocks):
            x = block.forward_with(attend_in(layer), x, step)
        self._logits[at] = self._logits_of(x[:, -1])
        self._sample()

    def decode(self, rows: list[int], tokens: list[int], positions: list[int]) -> None:
        """Draws the token after one new token per row; the others' results mean nothing."""
        at, newest = self._on_device(rows), self._on_device(tokens)
        self._tokens.zero_()
        self._positions.zero_()
        self._tokens[at], self._positions[at] = newest, self._on_device(positions)
        if self._sampling.repetition_penalty != 1.0:
            self._seen[at, newest] = 1
        if self._tokens.is_cuda and self._graph is None:
            self._capture()
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def drawn(self, rows: list[int], alternatives: int) -> list[tuple[int, float, Any]]:
        """The token of each row, its log-probability, and the likeliest ones with theirs.

        The log-probability is NaN where the row's logits are not finite.
        """
        at = self._on_device(rows)
        finite = self._logits[at].isfinite().all(1)
        known = self._logprobs[at].double().where(finite, torch.nan)
        tokens, logprobs = torch.stack([self._next[at].double(), known]).tolist()  # waits once
        others: list[list[tuple[int, float]]] = [[] for _ in rows]
        if alternatives:
            others = likeliest_tokens(self._logits[at].double().log_softmax(-1), alternatives)
        return list(zip(map(int, tokens), logprobs, others, strict=True))

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # torch's own stream for this is one of the device that captured first in the process.
        with torch.cuda.graph(self._graph, stream=stream):
            self._step()

    @torch.no_grad()
    def _step(self) -> None:
        model, step = self._model, Step(ops, 0.0, None)
        everyone = torch.arange(len(self._tokens), device=self._tokens.device)
        lengths = self._positions + 1

        def attend_in(layer: int) -> Attend:
            def attend(qkv: Tensor, n_head: int) -> Tensor:
                q, kv = qkv.flatten(0, 1).tensor_split([model.config.n_embd], dim=1)
                new = kv.unflatten(1, (2, n_head, -1))  # (R, 2, H, D)
                self._cache[layer].transpose(1, 3)[everyone, self._positions] = new.transpose(1, 2)
                return decode_attention(q, self._cache[layer], lengths)[:, None]

            return attend

        x = F.embedding(self._tokens, model.wte.weight)
        x = (x + F.embedding(self._positions, model.wpe.weight))[:, None]  # (R, 1, C)
        for layer, block in enumerate(model.blocks):
            x = block.forward_with(attend_in(layer), x, step)
        self._logits.copy_(self._logits_of(x[:, 0]))
        self._sample()

    def _logits_of(self, x: Tensor) -> Tensor:
        """x (n, C) -> (n, V) float32."""
        norm, head = self._model.ln_f, self._model.lm_head
        return ops.layer_norm_linear(x, norm.weight, norm.bias, head.weight, None).float()

    def _sample(self) -> None:
        sample(
            self._sampling, self._scores, self._seen, self._seeds, self._numbers, self._steps,
            self._next, self._logprobs,
        )  # fmt: skip

    def _on_device(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._tokens.device)
