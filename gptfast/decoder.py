"""Decoders: the logits after each sequence's window, and the windows of a batch of sequences.

Letters: L layers, H heads, D head_dim, T block_size, V vocab_size, n the sequences still running.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gptfast.errors import ConfigError
from gptfast.model import GPT
from gptfast.ops import decoder as decoder_ops
from gptfast.ops import select

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Decoder(Protocol):
    """Computes the logits after a window of tokens, keeping what it can between calls."""

    def __call__(
        self, tokens: np.ndarray, counts: np.ndarray, rows: np.ndarray, cached: np.ndarray
    ) -> Tensor:
        """Gives (n, V) float logits after each sequence's last new token.

        Args:
            tokens: New tokens, one sequence after the other.
            counts: (n,), how many of them each sequence has.
            rows: (n,), the sequences' cache rows.
            cached: (n,), how many tokens of the sequence's window came in earlier calls.
        """
        ...


class CachedDecoder:
    """All layers in one operator call per step, keys and values kept in a cache."""

    def __init__(self, model: GPT, rows: int, dtype: torch.dtype) -> None:
        config, empty = model.config, torch.empty(0)
        params, weights = [model.wte.weight, model.wpe.weight], []
        for block in model.blocks:
            if config.attention:
                params += [
                    block.ln_1.weight,
                    block.ln_1.bias,
                    block.attn.c_attn.bias,
                    block.attn.c_proj.bias,
                ]
                weights += [block.attn.c_attn.weight, block.attn.c_proj.weight]
            params += [
                block.ln_2.weight,
                block.ln_2.bias,
                block.mlp.c_fc.bias,
                block.mlp.c_proj.bias,
            ]
            weights += [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
        params += [model.ln_f.weight, model.ln_f.bias]
        weights.append(model.lm_head.weight)
        # A model in bfloat16 decodes in float32 from widened parameters; float32 ones serve both.
        self._params = [empty if p is None else p.detach().float() for p in params]
        self._packed = [decoder_ops.pack_weight(w.detach().float(), dtype) for w in weights]
        shape = (config.n_layer, 2, rows, config.n_head, config.block_size, config.head_dim)
        self._cache = torch.empty(shape, dtype=dtype)
        self._options = config.vocab_size, config.attention, config.gelu

    def __call__(
        self, tokens: np.ndarray, counts: np.ndarray, rows: np.ndarray, cached: np.ndarray
    ) -> Tensor:
        starts = np.concatenate([[0], np.cumsum(counts)])
        batch = [torch.from_numpy(np.ascontiguousarray(x)) for x in (tokens, starts, rows, cached)]
        return decoder_ops.forward(*batch, self._params, self._packed, self._cache, *self._options)


class UncachedDecoder:
    """The whole window through the reference at every step: the cached one's specification."""

    def __init__(self, model: GPT, rows: int, dtype: torch.dtype) -> None:
        self._model = copy.deepcopy(model).to(dtype).eval()
        self._window: list[list[int]] = [[] for _ in range(rows)]

    def __call__(
        self, tokens: np.ndarray, counts: np.ndarray, rows: np.ndarray, cached: np.ndarray
    ) -> Tensor:
        ends = np.cumsum(counts)
        logits = torch.empty(len(rows), self._model.config.vocab_size)
        for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
            self._window[row][cached[i] :] = tokens[end - counts[i] : end].tolist()
        lengths = cached + counts
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            windows = [self._window[rows[i]] for i in same]
            idx = torch.tensor(windows, device=self._model.wte.weight.device)  # (n, length)
            logits[same] = self._model(idx)[:, -1].float()
        return logits


def make_decoder(model: GPT, rows: int, dtype: str | None) -> Decoder:
    """The cached decoder where the kernels can run and the backend allows it, else the other."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be None or one of {sorted(DTYPES)}, got {dtype!r}")
    weight = model.wte.weight
    chosen = weight.dtype if dtype is None else DTYPES[dtype]
    if model.backend == "fused":
        select.require_fused("generate", weight.device.type, chosen)
    use_reference = model.backend == "reference" or select.unavailable(weight.device.type, chosen)
    return (UncachedDecoder if use_reference else CachedDecoder)(model, rows, chosen)


def window_stride(overflow: str) -> int | None:
    """How many tokens the window drops when it is full; None where it does not move."""
    if overflow == "recompute":
        return 1
    if overflow in ("stop", "error"):
        return None
    head, _, count = overflow.partition(":")
    if head == "stride" and count.isdigit() and int(count) > 0:
        return int(count)
    raise ConfigError(
        f"overflow must be 'recompute', 'stride:K' with K > 0, 'stop' or 'error', got {overflow!r}"
    )


class Batch:
    """Sequences that are generated together, each in its own window of its own length."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        block_size: int,
        new: int,
        stride: int | None,
    ):
        self._decoder, self._block_size, self._stride = decoder, block_size, stride
        self._length = np.array([len(prompt) for prompt in prompts])
        self._tokens = np.zeros((len(prompts), int(self._length.max()) + new), dtype=np.int64)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._offset = np.zeros(len(prompts), dtype=np.int64)  # where the window starts
        self._cached = np.zeros(len(prompts), dtype=np.int64)
        self.running = np.arange(len(prompts))

    def full(self) -> np.ndarray:
        """The running sequences whose next token has no place in a window that does not move."""
        if self._stride is not None:
            return self.running[:0]
        return self.running[self._length[self.running] > self._block_size]

    def logits(self) -> Tensor:
        """(n, V), after the last token of each running sequence."""
        rows = self.running
        over = np.maximum(self._length[rows] - self._offset[rows] - self._block_size, 0)
        moved = rows[over > 0]
        if len(moved):
            assert self._stride is not None
            self._offset[moved] += -(-over[over > 0] // self._stride) * self._stride
            self._cached[moved] = 0
        cached = self._cached[rows]
        counts = self._length[rows] - self._offset[rows] - cached
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        within = np.arange(counts.sum()) - np.repeat(first, counts)
        place = within + np.repeat(self._offset[rows] + cached, counts)
        self._cached[rows] += counts
        return self._decoder(self._tokens[np.repeat(rows, counts), place], counts, rows, cached)

    def append(self, tokens: np.ndarray) -> None:
        """Adds one token to each running sequence."""
        self._tokens[self.running, self._length[self.running]] = tokens
        self._length[self.running] += 1

    def drop(self, rows: Sequence[int] | np.ndarray) -> None:
        """Ends these sequences."""
        self.running = self.running[~np.isin(self.running, rows)]
