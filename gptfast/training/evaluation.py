"""How well a model predicts a text.

Letters: B batch, N tokens of a text, T block_size.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor, nn

from gptfast import data
from gptfast.checks import check_count, check_is, dtype_name
from gptfast.config import PRECISIONS, Precision
from gptfast.data.windows import TOKEN_DTYPES
from gptfast.errors import ConfigError, DataError
from gptfast.generation.request import check_tokenizer
from gptfast.generation.scoring import Window, bits_per, windows_of
from gptfast.model import GPT, unwrapped
from gptfast.tokenizer import TextSize, Tokenizer, text_size
from gptfast.training.distributed import ALONE, Processes
from gptfast.training.sharding import is_sharded

EVAL_TOKENS_AT_ONCE = 8192  # limits the memory of an evaluation
IGNORED = -100  # a target that counts for nothing

Scored = Callable[[int], object]  # is told how many more tokens have been predicted


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # mean over the tokens, nats
    perplexity: float  # exp(loss)
    tokens: int  # number of predicted tokens: all but the first of the text
    size: TextSize | None = None  # what these tokens write; None without a tokenizer

    @property
    def bits_per_token(self) -> float:
        """Mean cross-entropy per token, in bits."""
        return self.loss / math.log(2)

    @property
    def bits_per_character(self) -> float | None:
        """Cross-entropy of all tokens per character, in bits; None without any or a tokenizer."""
        return self._bits_per(self.size and self.size.characters)

    @property
    def bits_per_byte(self) -> float | None:
        """Cross-entropy of all tokens per byte in UTF-8, which compares models of any tokenizers.

        In bits; None without bytes or a tokenizer. An end-of-text token writes no byte, but the
        bits of its prediction count: whoever reads the text does not know where it ends.
        """
        return self._bits_per(self.size and self.size.utf8_bytes)

    def _bits_per(self, count: int | None) -> float | None:
        return bits_per(self.loss * self.tokens, count)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    ids: Tensor,
    precision: Precision = "fp32",
    processes: Processes = ALONE,
    *,
    stride: int | None = None,
    tokenizer: Tokenizer | None = None,
    scored: Scored = lambda _: None,
) -> Evaluation:
    """Computes the mean loss over a text, without dropout.

    The logits of the whole text are never in memory, and of a mapped file we read only the windows
    that are computed together, so the text may have any length. `gptfast.score` gives each token's
    loss.

    Args:
        model: A GPT, which torch.compile or DistributedDataParallel may wrap. Its modules are
            switched to evaluation mode and back to their previous mode.
        ids: (N,) int64 or smaller integers, at least 2 tokens.
        precision: "fp32", or "bf16" for activations in bfloat16.
        processes: The processes that share the windows; all must call this. The result is the same
            as with one process.
        stride: How many tokens the window moves along the text, at most block_size. Each token past
            the first window is predicted from at least block_size - stride + 1 tokens before it,
            which takes block_size / stride times as long as disjoint windows do. None: disjoint
            windows of block_size tokens, of which the last may be shorter; the first tokens of each
            are predicted from few, so the loss is higher. (With stride=block_size only the last
            window differs: it is moved back until it is full.)
        tokenizer: The tokenizer of `ids`, which says what text they write.
        scored: Called with the number of tokens predicted since its last call.

    Returns:
        The mean loss in nats per token, the perplexity, the number of predicted tokens (the first
        of the text is not predicted), and with a tokenizer bits per character and per byte.

    Raises:
        ConfigError: `precision` is unknown, `stride` is not between 1 and block_size, or the
            tokenizer has ids that the model does not have.
        DataError: `ids` is not a 1-D tensor of integers, or has fewer than 2 tokens.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    check_is("evaluate: ids", ids, Tensor, "a tensor of tokens")
    if ids.dim() != 1 or ids.dtype not in TOKEN_DTYPES or len(ids) < 2:
        raise DataError(
            "evaluate: ids must be a 1-D tensor of at least 2 tokens, int64 or smaller integers, "
            f"got shape {tuple(ids.shape)} of {dtype_name(ids.dtype)}"
        )
    gpt = unwrapped(model)
    T, device = gpt.config.block_size, gpt.main_weight.device
    stride = None if stride is None else check_count("stride", stride, 1, T)
    check_tokenizer(tokenizer, gpt.config)
    size = None if tokenizer is None else text_size(tokenizer, ids[1:])
    ids = data.placed(ids, device)
    tokens = len(ids) - 1
    batches = _batches(windows_of(len(ids), T, stride))
    modes = [(module, module.training) for module in gpt.modules()]
    gpt.eval()
    try:
        with autocast(device, precision):
            total = _shared_sum(lambda batch: _nats(gpt, ids, batch), batches, processes, scored)
    finally:
        for module, training in modes:
            module.training = training
    loss = total / tokens
    # The exponent is clamped, because math.exp raises OverflowError when a run has diverged.
    return Evaluation(loss, math.exp(min(loss, 700.0)), tokens, size)


def _batches(windows: Iterator[Window]) -> Iterator[list[Window]]:
    """Groups windows of equal lengths by what fits into EVAL_TOKENS_AT_ONCE."""
    for length, group in groupby(windows, lambda window: window.length):
        while batch := list(islice(group, max(1, EVAL_TOKENS_AT_ONCE // length))):
            yield batch


def _count(batch: list[Window]) -> int:
    return sum(window.new for window in batch)


def _nats(gpt: GPT, ids: Tensor, batch: list[Window]) -> float:
    """Sums the losses of the new tokens in windows of equal lengths."""
    length = batch[0].length
    starts = torch.tensor([window.first for window in batch])
    idx, targets = (each.to(gpt.main_weight.device) for each in data.gather(ids, starts, length))
    old = torch.tensor([length - window.new for window in batch], device=idx.device)  # (B,)
    targets.masked_fill_(torch.arange(length, device=idx.device) < old[:, None], IGNORED)
    # A sharded model gathers its weights only when it is called.
    loss = gpt(idx, targets=targets) if is_sharded(gpt) else gpt.loss(idx, targets)
    return loss.item() * _count(batch)


def _shared_sum(
    value: Callable[[list[Window]], float],
    batches: Iterable[list[Window]],
    processes: Processes,
    scored: Scored,
) -> float:
    """Sums a value over batches in their order, each computed by one of the processes."""
    remaining, own, count = iter(batches), [], 0
    while turn := list(islice(remaining, processes.size)):
        # In the last turn, a process without a batch computes one that does not count.
        own.append(value(turn[min(processes.rank, len(turn) - 1)]))
        count += len(turn)
        scored(sum(map(_count, turn)))
    found = processes.gathered(*own)
    return sum(found[i % processes.size][i // processes.size] for i in range(count))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Returns a context in which activations have the dtype of `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
