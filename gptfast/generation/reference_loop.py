"""Generation without a cache, by the model's reference: the specification of the engine."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.errors import ConfigError
from gptfast.generation.mergeable import engine_oddity
from gptfast.generation.request import Request, Update, not_finite
from gptfast.model import GPT
from gptfast.ops.sampling import choose, draws


class ReferenceLoop:
    """The whole window of each sequence through the model at every step."""

    def __init__(self, model: GPT, request: Request) -> None:
        self._model = self._prepared(model, request.dtype)
        self._request = request
        self._tokens = [list(prompt) for prompt in request.prompts]
        self._offset = [0] * len(self._tokens)
        first = "running" if request.max_new_tokens > 0 else "length"
        self._all = [Update(i, first, [], [], []) for i in range(len(self._tokens))]
        self._reported: dict[int, tuple[int, str]] = {}

    def _prepared(self, model: GPT, dtype: str | None) -> GPT:
        return reference_model(model, dtype)

    @torch.no_grad()
    def run(self, seconds: float) -> bool:
        """One token for every sequence; see Loop."""
        for i in self._running():
            self._slide(i)
        self._advance(self._running())
        return bool(self._running())

    def _advance(self, running: list[int]) -> None:
        """The next token of each of these sequences."""
        lengths = np.array([len(self._window(i)) for i in running])
        for length in np.unique(lengths):
            group = [running[n] for n in np.flatnonzero(lengths == length)]
            for first in range(0, len(group), self._request.max_batch):
                self._step(group[first : first + self._request.max_batch])

    def updates(self) -> list[Update]:
        """See Loop."""
        found = []
        for i, own in enumerate(self._all):
            end = len(own.tokens)  # Ctrl-C may have come before a token, after what is said of it
            if self._reported.get(i) == (end, own.state):
                continue
            start, _ = self._reported.get(i, (0, ""))
            found.append(
                Update(
                    i,
                    own.state,
                    own.tokens[start:end],
                    own.logprobs[start:end],
                    own.alternatives[start:end],
                )
            )
            self._reported[i] = end, own.state
        return found

    def _running(self) -> list[int]:
        return [i for i, own in enumerate(self._all) if own.state == "running"]

    def _generated(self, i: int) -> int:
        return len(self._all[i].tokens)

    def _window(self, i: int) -> list[int]:
        return self._tokens[i][self._offset[i] :]

    def _slide(self, i: int) -> None:
        over = len(self._window(i)) - self._model.config.block_size
        stride = self._request.stride
        if over <= 0:
            return
        if stride is None:
            self._all[i].state = "window"
        else:
            self._offset[i] += -(-over // stride) * stride

    def _step(self, group: list[int]) -> None:
        request = self._request
        idx = torch.tensor([self._window(i) for i in group])  # (n, length)
        logits = self._model(idx.to(self._model.main_weight.device))[:, -1].float().cpu()  # (n, V)
        finite = logits.isfinite().all(-1)
        if not finite.all():
            raise not_finite("prompt", group[int(finite.int().argmin())] // request.num_samples)
        steps = [self._generated(i) for i in group]
        uniforms = draws(
            torch.tensor([request.seeds[i] for i in group]),
            torch.tensor([request.numbers[i] for i in group]),
            torch.tensor(steps),
        )
        chosen = choose(request.sampling, logits, [self._tokens[i] for i in group], uniforms)
        logprobs = logits.double().log_softmax(-1)
        likeliest = likeliest_tokens(logprobs, request.alternatives)
        for i, token, row, others in zip(group, chosen.tolist(), logprobs, likeliest, strict=True):
            self._append(i, token, float(row[token]), others)

    def _append(
        self, i: int, token: int, logprob: float, alternatives: list[tuple[int, float]]
    ) -> None:
        request, own = self._request, self._all[i]
        if token in request.stop_tokens:
            own.state = "stop"
            return
        own.logprobs.append(logprob)
        if request.alternatives:
            own.alternatives.append(alternatives)
        self._tokens[i].append(token)
        own.tokens.append(token)
        if request.stop_strings and request.pieces is not None:
            text = "".join(request.pieces[token] for token in own.tokens)
            if any(stop in text for stop in request.stop_strings):
                own.state = "stop"
                return
        if len(own.tokens) == request.max_new_tokens:
            own.state = "length"


def likeliest_tokens(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each row, and their log-probabilities."""
    found = logprobs.sort(descending=True, stable=True)
    rows = found.indices[:, :count].tolist(), found.values[:, :count].tolist()
    return [list(zip(tokens, values, strict=True)) for tokens, values in zip(*rows, strict=True)]


def reference_model(model: GPT, dtype: str | None) -> GPT:
    """A copy of the model that computes in this dtype; int8 means rounded weights in float32.

    Raises:
        ConfigError: The dtype is int8 and the model has other layers than plain ones.
    """
    oddity = engine_oddity(model) if dtype == "int8" else None
    if oddity is not None:
        raise ConfigError(f"dtype='int8' rounds the weights of plain layers, and {oddity}")
    chosen = _snapshot(model).eval()
    if dtype == "int8":
        chosen = chosen.float()
        for name, param in chosen.named_parameters():
            if param.dim() == 2 and not name.startswith(("wte", "wpe")):
                param.data = rounded_to_bytes(param.data)
        if model.config.tie_weights:  # the embedding itself is not rounded
            chosen.lm_head.weight = torch.nn.Parameter(rounded_to_bytes(chosen.wte.weight.data))
    elif dtype is not None:
        chosen = chosen.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    return chosen


def _snapshot(model: GPT) -> GPT:
    """A deep copy with the user's own hooks: copies of what they write to would see nothing."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith(("_forward_hooks", "_pre_hooks", "_backward_hooks")):
                known |= {id(hook): hook for hook in value.values()}
            # The weight that weight_norm or prune made is a result, which torch does not copy.
            elif isinstance(value, Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    return copy.deepcopy(model, known)


def rounded_to_bytes(weight: Tensor) -> Tensor:
    """A weight (N, K) as its 8-bit form counts: whole multiples of max |row| / 127."""
    unit = weight.abs().amax(1, keepdim=True) / 127  # (N, 1)
    return torch.where(unit == 0, 0.0, (weight * (1 / unit)).round() * unit)
