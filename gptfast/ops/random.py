"""Counter-based random numbers: independent of the batch, the thread count and the device.

The kernels compute the same numbers (csrc/kernels/simd/philox.inl).
"""

import torch
from torch import Tensor

from gptfast.checks import check_seed
from gptfast.errors import ConfigError

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def seed_tensor(seed: int | Tensor | None, generator: torch.Generator | None = None) -> Tensor:
    """Returns the key of a random stream as an int64 tensor; None draws a random key.

    A tensor's value is not checked, because reading it would synchronise with a GPU. A negative
    value is a key different from all others.

    Args:
        seed: An integer, an int64 tensor with one element, which is returned as it is, or None.
        generator: The source of the random key; None uses torch's default generator.

    Raises:
        ConfigError: An int is not in [0, 2**63), or a tensor is not int64 with one element.
    """
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, generator=generator, device="cpu")
    if not isinstance(seed, Tensor):
        return torch.tensor(check_seed(seed), dtype=torch.int64, device="cpu")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ConfigError(
            f"seed must be one whole number or an int64 tensor of one, got {tuple(seed.shape)} of"
            f" {seed.dtype}"
        )
    return seed


def philox(counter: tuple[Tensor | int, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Computes Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit words (int64) per counter."""
    x0, x1, x2, x3 = torch.broadcast_tensors(*(torch.as_tensor(word) for word in counter))
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        first, second = x0 * PHILOX_MULTIPLIERS[0], x2 * PHILOX_MULTIPLIERS[1]
        x0, x2 = (second >> 32 & WORD) ^ x1 ^ k0, (first >> 32 & WORD) ^ x3 ^ k1
        x1, x3 = second & WORD, first & WORD
        k0, k1 = k0 + PHILOX_WEYL[0] & WORD, k1 + PHILOX_WEYL[1] & WORD
    return x0, x1, x2, x3


def dropout_factors(
    p: float, seed: Tensor, stream: int, matrices: int, rows: int, columns: int
) -> Tensor:
    """Computes the dropout factors, 0 or 1 / (1 - p), as (matrices, rows, columns) float64.

    p is rounded to a multiple of 1 / 65536. Element (i, j) of matrix n uses 16 bits of the Philox
    block with counter (j, i // 8, n, stream): half i % 2 of word (i % 8) // 2. It is dropped if
    their value is below round(65536 p).
    """
    i, j = torch.arange((rows + 7) // 8), torch.arange(columns)
    words = philox(
        (j, i[:, None], torch.arange(matrices)[:, None, None], stream & WORD), seed.cpu()
    )
    halves = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
    draws = torch.stack(halves, dim=2).flatten(1, 2)[:, :rows]  # (matrices, rows, columns)
    threshold = int(p * 65536 + 0.5)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return (draws >= threshold).double() * scale
