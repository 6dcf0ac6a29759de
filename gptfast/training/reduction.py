"""Sums over processes in the order of their ranks, so that a sum has the same bits each time.

On GPUs the sums are NCCL's, in an order of its own, which is fixed for a machine.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def scattered_sum(x: Tensor, group: Any = None) -> Tensor:
    """Sums a part of a tensor over all processes; each has another part.

    Args:
        x: (W n,) of every process, on the CPU.
        group: The processes, W; None: all.

    Returns:
        (n,), the sum of the part with this process's rank.
    """
    parts = torch.empty_like(x)
    dist.all_to_all_single(parts, x, group=group)
    first, *others = parts.view(dist.get_world_size(group), -1)
    for part in others:
        first += part
    return first


def sum_(x: Tensor, group: Any = None) -> None:
    """Replaces a tensor, contiguous and on the CPU, by its sum over all processes."""
    size, flat = dist.get_world_size(group), x.view(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
    own = scattered_sum(padded, group)
    dist.all_gather(list(padded.view(size, -1)), own, group=group)
    flat.copy_(padded[: len(flat)])


def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums a bucket of gradients as DistributedDataParallel does, but without its division."""
    buffer = bucket.buffer()
    if buffer.device.type != "cpu":
        work = dist.all_reduce(buffer, group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
    sum_(buffer, group)
    summed: torch.futures.Future[Tensor] = torch.futures.Future()
    summed.set_result(buffer)
    return summed


class ReduceScatter:
    """Sums gradients for FSDP on CPUs."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns memory for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Writes the part of the sum that this process keeps."""
        output_tensor.copy_(scattered_sum(input_tensor, group))
