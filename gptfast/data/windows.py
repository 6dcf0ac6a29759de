"""Batches of training windows, from tokens of any integer dtype, in memory or in a mapped file.

Letters: B batch, T block_size, N tokens of a text.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptfast.checks import as_int, dtype_name
from gptfast.data.shuffle import shuffled
from gptfast.errors import DataError

# torch has few operations for the two that are not signed: they are read as the signed type of the
# same size, and the mask makes what comes out negative positive again.
_SIGNED = {torch.uint16: (torch.int16, 0xFFFF), torch.uint32: (torch.int32, 0xFFFF_FFFF)}
TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, *_SIGNED)
EASY = 1 / 4  # of a device's free memory, which tokens may fill


def _num_windows(ids: Tensor, block_size: int) -> int:
    what = "windows: ids must be a 1-D tensor of int64 or smaller integers, got"
    if not isinstance(ids, Tensor):
        raise DataError(f"{what} {type(ids).__name__}")
    if ids.dim() != 1 or ids.dtype not in TOKEN_DTYPES:
        raise DataError(f"{what} {ids.dim()}-D {dtype_name(ids.dtype)}")
    if len(ids) <= block_size:
        raise DataError(
            f"the text is shorter than a window: it has {len(ids)} tokens and a window needs "
            f"{block_size + 1} (block_size {block_size} and the token after it)"
        )
    return len(ids) - block_size


def _size(name: str, value: int) -> int:
    count = as_int(value)
    if count is None or count < 1:
        raise DataError(f"windows: {name} must be a whole number, at least 1, got {value!r}")
    return count


def as_int64(ids: Tensor) -> Tensor:
    """Returns tokens of any of TOKEN_DTYPES as int64; the tensor itself if it is that already."""
    if ids.dtype not in _SIGNED:
        return ids.long()
    signed, mask = _SIGNED[ids.dtype]
    return ids.view(signed).long().bitwise_and_(mask)


def placed(ids: Tensor, device: torch.device) -> Tensor:
    """Moves tokens to a device where they take little of its free memory.

    Args:
        ids: (N,) of any of TOKEN_DTYPES.
        device: Where a model is.

    Returns:
        The tokens there; where they are too many, `ids` itself, whose windows are then gathered on
        the host, batch by batch.
    """
    if device.type == "cuda" and ids.device.type == "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        if ids.numel() * ids.element_size() > EASY * free:
            return ids
    return ids.to(device)


def gather(ids: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns the windows of a text that start at `starts`.

    Args:
        ids: Tokens of the text, (N,) of any of TOKEN_DTYPES; of a mapped file, only the windows
            are read.
        starts: (B,) int64, in [0, N - T); copied to the device of `ids`, if it is elsewhere.
        block_size: T, the length of a window.

    Returns:
        Inputs and targets (the inputs shifted by one), each (B, T) int64 on the device of `ids`.
    """
    first = torch.arange(2, device=ids.device)[:, None, None]
    at = starts.to(ids.device)[:, None] + torch.arange(block_size, device=ids.device)  # (B, T)
    signed, _ = _SIGNED.get(ids.dtype, (ids.dtype, 0))
    idx, targets = as_int64(ids.view(signed)[at + first].view(ids.dtype))
    return idx, targets


def random_starts(
    ids: Tensor, block_size: int, batch_size: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws where the windows of `random_windows` start: (B,) int64 on the generator's device."""
    block_size, batch_size = _size("block_size", block_size), _size("batch_size", batch_size)
    total = _num_windows(ids, block_size)
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randint(total, (batch_size,), generator=generator, device=device)


def random_windows(
    ids: Tensor, block_size: int, batch_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws `batch_size` windows whose starts are independent and uniformly distributed.

    Args:
        ids: Tokens of the text, (N,) of any of TOKEN_DTYPES.
        block_size: T, the length of a window.
        batch_size: B.
        generator: The source of the starts; torch's default generator if None.

    Returns:
        Inputs and targets (the inputs shifted by one), each (B, T) int64 on the device of `ids`.

    Raises:
        DataError: The text is shorter than T + 1, a size is below 1, or `ids` is not 1-D or of
            another dtype.
    """
    return gather(ids, random_starts(ids, block_size, batch_size, generator), block_size)


class EpochWindows:
    """Iterates over all windows of a text in batches; each iteration is one epoch in a new order.

    Args:
        ids: Tokens of the text, (N,) of any of TOKEN_DTYPES.
        block_size: T, the length of a window.
        batch_size: B; the last batch of an epoch may be smaller.
        generator: The source of a new random order per epoch; None keeps the order of the text.
        stride: Distance between starts; 1 gives all N - T windows, T gives disjoint targets.

    Raises:
        DataError: The text is shorter than T + 1, a size is below 1, or `ids` is not 1-D or of
            another dtype.
    """

    def __init__(
        self,
        ids: Tensor,
        block_size: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        stride: int = 1,
    ) -> None:
        self.ids = ids
        self.block_size = _size("block_size", block_size)
        self.batch_size = _size("batch_size", batch_size)
        self.generator = generator
        self.stride = _size("stride", stride)
        self.num_windows = -(-_num_windows(ids, self.block_size) // self.stride)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return (self.num_windows + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs and targets, each (B, T) int64 on the device of `ids`."""
        for starts in self.starts():
            yield gather(self.ids, starts, self.block_size)

    def starts(self, done: int = 0) -> Iterator[Tensor]:
        """Yields where the windows of each batch of an epoch start, (B,) int64 each.

        Args:
            done: How many batches of the epoch to skip, at little cost.
        """
        first = done * self.batch_size
        if self.generator is None:
            for start in range(first, self.num_windows, self.batch_size):
                end = min(start + self.batch_size, self.num_windows)
                yield torch.arange(start, end) * self.stride
            return
        for chosen in shuffled(self.num_windows, self.batch_size, self.generator, first):
            yield chosen * self.stride


def epoch_windows(
    ids: Tensor, block_size: int, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns an iterator over one epoch of `EpochWindows`; without generator in text order."""
    return iter(EpochWindows(ids, block_size, batch_size, generator))
