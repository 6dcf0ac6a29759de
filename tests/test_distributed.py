"""Two processes that train one model, by gloo on this machine."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pair import Pair
from torch import Tensor, distributed

from gptfast import GPT, CheckpointError, GPTConfig, TrainConfig, train
from gptfast.training import reduction, sharding
from gptfast.training.distributed import Processes, join

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
CONFIG = GPTConfig(block_size=8, vocab_size=7, n_layer=2, n_head=2, n_embd=16, dropout=0.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


def make_model(config: GPTConfig = CONFIG) -> GPT:
    return GPT(config, generator=torch.Generator().manual_seed(1))


def processes() -> Processes:
    return join(torch.device("cpu"))


def _sums(sizes: list[int]) -> list[Tensor]:
    rank, results = distributed.get_rank(), []
    for n in sizes:
        x = torch.randn(n, generator=torch.Generator().manual_seed(rank))
        reduction.sum_(x)
        results.append(x)
    return results


def test_sums_are_in_the_order_of_ranks(pair: Pair) -> None:
    sizes = [1, 2, 7, 1000]
    for n, *sums in zip(sizes, *pair(_sums, sizes), strict=True):
        first, second = (torch.randn(n, generator=torch.Generator().manual_seed(r)) for r in (0, 1))
        for found in sums:
            assert torch.equal(found, first + second)


def _agreed() -> list[Any]:
    group = processes()
    group.wait()
    found: list[Any] = [group.gathered(group.rank, 0.1), group.from_first(lambda: group.rank)]

    def fail() -> None:
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        group.from_first(fail)
    return found


def test_processes_agree(pair: Pair) -> None:
    assert pair(_agreed) == 2 * [[[[0.0, 0.1], [1.0, 0.1]], 0]]


def test_one_process_is_alone() -> None:
    group = processes()
    assert (group.rank, group.size, group.first) == (0, 1, True)
    assert group.gathered(1.0) == [[1.0]] and group.from_first(lambda: 5) == 5
    group.wait()


def _gradients(parallel: Any, tied: bool) -> list[Tensor]:
    config = TrainConfig(parallel=parallel)
    model = sharding.shared(make_model(), config, processes())
    rows = torch.arange(24).view(3, 8) % 7
    own = rows[:2] if distributed.get_rank() == 0 else rows[2:]
    loss = model(own, targets=own)
    loss.backward(torch.tensor(len(own) / 3))
    return [sharding.whole(param.grad) for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_those_of_the_joint_batch(pair: Pair, parallel: str) -> None:
    model, rows = make_model(), torch.arange(24).view(3, 8) % 7
    for part in rows[:2], rows[2:]:
        model.loss(part, part).backward(torch.tensor(len(part) / 3))
    for found in pair(_gradients, parallel, False):
        for own, param in zip(found, model.parameters(), strict=True):
            assert param.grad is not None and torch.equal(own, param.grad)


TEXT = "the quick brown fox jumps over the lazy dog; " * 3
OPTIONS: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 7, "steps": None,
    "epochs": 1, "dropout": 0.2, "val_fraction": 0.3, "text_fraction": 1.0, "clip": None,
}  # fmt: skip
Outcome = tuple[dict[str, Tensor], list[float], list[int]]


def _trained(**options: Any) -> Outcome:
    result = train("abc", text=TEXT, progress=False, **OPTIONS | options)
    return (
        result.model.state_dict(),
        [row["val_loss"] for row in result.history],
        [row["step"] for row in result.history],
    )


def _train(options: dict[str, Any]) -> Outcome:
    return _trained(**options)


def is_same(one: Outcome, other: Outcome) -> bool:
    weights = all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return weights and one[1:] == other[1:]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "weight_decay": 0.1, "decayed": "matrices"}])
def test_two_processes_have_the_bits_of_one_with_two_parts(
    pair: Pair, parallel: str, options: dict[str, Any]
) -> None:
    # 87 windows in batches of 7: the last one has 3 rows, of which the second process gets one.
    alone = _trained(accumulation_steps=2, **options)
    for found in pair(_train, {"parallel": parallel, **options}):
        assert is_same(found, alone)
