"""What the tests of training steps share: batches, comparisons by bits, interruptions."""

import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptfast import Trainer
from gptfast.training import TrainResult


def batch_of(i: int, B: int, T: int, V: int) -> tuple[Tensor, Tensor]:
    """Returns batch i: inputs and targets, (B, T) each, of tokens 1 to V - 1."""
    idx, targets = torch.randint(1, V, (2, B, T), generator=torch.Generator().manual_seed(i))
    return idx, targets


def assert_same(a: Trainer, b: Trainer) -> None:
    """Both have the same weights, moments, means and random numbers to come, bit by bit."""
    for name, x, y in zip(a.names, a.parameters, b.parameters, strict=True):
        assert torch.equal(x, y), name
        moments = a.optimizer.state[x].values(), b.optimizer.state[y].values()
        assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True)), name
    for one, other in zip(a.optimizer.averages, b.optimizer.averages, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(a.generator.get_state(), b.generator.get_state())


def interrupt(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """Ends the run to come after step `cut`, once."""
    step_at: Callable[..., Tensor] = Trainer.step_at
    done: list[int] = []

    def counted(self: Trainer, ids: Tensor, starts: Tensor) -> Tensor:
        done.append(1)
        loss = step_at(self, ids, starts)
        if len(done) == cut:
            signal.raise_signal(signal.SIGTERM)  # a shell's background jobs ignore SIGINT
        return loss

    monkeypatch.setattr(Trainer, "step_at", counted)


def losses_of(result: TrainResult) -> list[tuple[int, float, float]]:
    """Returns the steps of a run's evaluations with their losses."""
    return [(row["step"], row["train_loss"], row["val_loss"]) for row in result.history]
