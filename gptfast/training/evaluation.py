"""How well a model predicts a text.

Letters: N tokens of a text, T block_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptfast import data
from gptfast.config import PRECISIONS, Precision
from gptfast.data.windows import TOKEN_DTYPES
from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT, unwrapped
from gptfast.training.distributed import ALONE, Processes
from gptfast.training.sharding import is_sharded

EVAL_TOKENS_AT_ONCE = 8192  # limits the memory of an evaluation


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # mean over the tokens, nats
    perplexity: float  # exp(loss)
    tokens: int  # number of predicted tokens: all but the first of the text


@torch.no_grad()
def evaluate(
    model: nn.Module, ids: Tensor, precision: Precision = "fp32", processes: Processes = ALONE
) -> Evaluation:
    """Computes the mean loss over a text in disjoint windows, without dropout.

    Args:
        model: a GPT, which torch.compile or DistributedDataParallel may wrap. Its modules are
            switched to evaluation mode and back to their previous mode.
        ids: (N,) int64 or smaller integers, at least 2 tokens. Windows have block_size tokens; the
            last may be shorter.
        precision: "fp32", or "bf16" for activations in bfloat16.
        processes: those that share the windows out, and all call this; the result is that of one.

    Returns:
        The mean loss in nats per token, the perplexity, and the number of predicted tokens.

    Raises:
        ConfigError: `precision` is unknown.
        DataError: `ids` is not a 1-D tensor of integers, or has fewer than 2 tokens.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if ids.dim() != 1 or ids.dtype not in TOKEN_DTYPES or len(ids) < 2:
        raise DataError(
            "evaluate: ids must be a 1-D tensor of at least 2 tokens, int64 or smaller integers, "
            f"got shape {tuple(ids.shape)} of {str(ids.dtype)[6:]}"
        )
    gpt = unwrapped(model)
    T, device = gpt.config.block_size, gpt.main_weight.device
    ids = data.placed(ids, device)
    tokens = len(ids) - 1
    whole = tokens // T * T
    rows = max(1, EVAL_TOKENS_AT_ONCE // T)
    batches: list[tuple[Tensor, Tensor]] = []
    if whole:
        xs, ys = ids[:whole].view(-1, T), ids[1 : whole + 1].view(-1, T)
        batches += zip(xs.split(rows), ys.split(rows), strict=True)
    if whole < tokens:
        batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    modes = [(module, module.training) for module in gpt.modules()]
    gpt.eval()
    try:
        with autocast(device, precision):
            total = _shared_sum(lambda x, y: _loss(gpt, x, y) * y.numel(), batches, processes)
    finally:
        for module, training in modes:
            module.training = training
    loss = total / tokens
    # The exponent is clamped, because math.exp raises OverflowError when a run has diverged.
    return Evaluation(loss, math.exp(min(loss, 700.0)), tokens)


def _loss(gpt: GPT, idx: Tensor, targets: Tensor) -> float:
    device = gpt.main_weight.device
    idx, targets = (data.as_int64(each.to(device)) for each in (idx, targets))
    # A model of which each process has a part gathers itself where it is called.
    loss = gpt(idx, targets=targets) if is_sharded(gpt) else gpt.loss(idx, targets)
    return loss.item()


def _shared_sum(
    value: Callable[[Tensor, Tensor], float],
    batches: list[tuple[Tensor, Tensor]],
    processes: Processes,
) -> float:
    """Sums a value over batches in their order, each computed by one of the processes."""
    rounds = range(0, len(batches), processes.size)
    # In the last round, a process without a batch computes one that does not count.
    own = [value(*batches[min(i + processes.rank, len(batches) - 1)]) for i in rounds]
    found = processes.gathered(*own)
    return sum(found[i % processes.size][i // processes.size] for i in range(len(batches)))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Makes activations those of `precision`, within a `with`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
