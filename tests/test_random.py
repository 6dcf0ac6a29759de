"""The reference's own random numbers: known answers, and masks of the right probability."""

from typing import Any

import numpy as np
import pytest
import torch

from gptfast import ConfigError, ops
from gptfast.ops.random import dropout_factors, philox, seed_tensor


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    (
        # Known answers from the code of the Philox-4x32-10 paper.
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            -1,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
)
def test_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    got = philox(counter, torch.tensor(key))
    assert tuple(int(word) for word in got) == words


def test_counters_give_blocks_of_their_own() -> None:
    words = torch.stack(philox((torch.arange(1000), 3, 5, 9), torch.tensor(42)), dim=1)
    assert len({tuple(block) for block in words.tolist()}) == 1000


@pytest.mark.parametrize("p", (0.1, 0.2, 0.5, 0.9))
def test_share_and_value_of_what_is_kept(p: float) -> None:
    factors = dropout_factors(p, seed_tensor(3), 1, 4, 99, 501)
    kept = factors[factors > 0]
    assert factors.shape == (4, 99, 501)
    assert torch.allclose(kept, torch.tensor(1 / (1 - p), dtype=torch.float64), rtol=1e-4)
    share, count = kept.numel() / factors.numel(), factors.numel()
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / count) ** 0.5 + 1e-5


def test_masks_of_streams_seeds_and_matrices_differ_and_of_shapes_agree() -> None:
    mask = dropout_factors(0.5, seed_tensor(1), 0, 2, 40, 40)
    assert torch.equal(mask[:, :17, :9], dropout_factors(0.5, seed_tensor(1), 0, 2, 17, 9))
    for other in (
        dropout_factors(0.5, seed_tensor(2), 0, 2, 40, 40),
        dropout_factors(0.5, seed_tensor(1), 1, 2, 40, 40),
        mask.flip(0),
    ):
        assert 0.4 < (mask != other).double().mean() < 0.6


def test_a_seed_is_a_whole_number_of_any_type() -> None:
    for seed in (0, np.int64(5), np.uint64(2**63 - 1), 2**63 - 1):
        key = seed_tensor(seed)
        assert key.dtype == torch.int64 and key.shape == () and key.item() == int(seed)


@pytest.mark.parametrize(
    "seed",
    (-1, 2**63, 2**64, np.uint64(2**63), 1.0, "a", True, torch.tensor(1.0), torch.tensor([1, 2])),
)
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ConfigError, match=r"seed must be (a|one) whole number .*, got "):
        seed_tensor(seed)
    for backend in (ops, ops.reference):
        with pytest.raises(ConfigError, match="seed must be"):
            backend.causal_attention(q, q, q, dropout_p=0.5, seed=seed)


def test_seeds_can_be_compiled() -> None:
    compiled = torch.compile(seed_tensor, backend="eager", fullgraph=True)
    for seed in (1, 2, 3, 2**63 - 1):  # a second value makes it a graph input
        assert compiled(seed).item() == seed
    assert compiled(torch.tensor(4)).item() == 4
