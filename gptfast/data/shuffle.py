"""Random orders of the numbers below n: by a table of 4 bytes a number, or, for many, without."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

MOST_IN_A_TABLE = 2**27  # numbers, 512 MiB: a table of more would outgrow what the tokens take
ROUNDS = 6
BLOCK = 2**16  # numbers that are computed at once where there is no table


def shuffled(
    n: int, batch_size: int, generator: torch.Generator, first: int = 0
) -> Iterator[Tensor]:
    """Yields the numbers below n in a random order, in batches.

    Up to MOST_IN_A_TABLE numbers, the order is that of `torch.randperm`.

    Args:
        n: How many numbers.
        batch_size: B; the last batch may be smaller.
        generator: The source of the order; a part of the order is drawn at the first batch.
        first: How many numbers of the order to skip.

    Yields:
        (B,) int64, on the generator's device from a table, else on the CPU.
    """
    if n <= MOST_IN_A_TABLE:
        device = generator.device
        # On a GPU the order depends on the dtype.
        dtype = torch.int32 if device.type == "cpu" else torch.int64
        table = torch.randperm(n, generator=generator, device=device, dtype=dtype)
        for start in range(first, n, batch_size):
            yield table[start : start + batch_size].long()
        return
    permutation = Permutation(n, generator)
    step = max(1, BLOCK // batch_size) * batch_size
    for start in range(first, n, step):
        block = permutation(np.arange(start, min(start + step, n), dtype=np.uint64))
        yield from torch.from_numpy(block.astype(np.int64)).split(batch_size)


class Permutation:
    """A random permutation of the numbers below n, computed number by number.

    A Feistel network of ROUNDS rounds permutes the numbers of 2 * half bits; whoever lands at n or
    beyond goes through it again, until it is below. It takes no memory and can start anywhere.

    Args:
        n: How many numbers, at least 1.
        generator: The source of the rounds' keys.
    """

    def __init__(self, n: int, generator: torch.Generator) -> None:
        drawn = torch.randint(
            2**63 - 1, (ROUNDS,), generator=generator, device=generator.device, dtype=torch.int64
        )
        self._n = np.uint64(n)
        self._keys = drawn.cpu().numpy().astype(np.uint64)
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64(2**half - 1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns where numbers go: (M,) uint64 from (M,) uint64, all below n."""
        x = self._rounds(x)
        while (out := x >= self._n).any():
            x[out] = self._rounds(x[out])
        return x

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mixes 64 bits: the last steps of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
