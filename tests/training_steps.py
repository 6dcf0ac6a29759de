"""What the tests of training share: batches, short runs, comparisons by bits, interruptions."""

import json
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import GPTConfig, TrainConfig, Trainer, data
from gptfast.ops import select
from gptfast.presets import Preset
from gptfast.training import TrainResult, run, train

TEXT = data.abc_corpus()[:1200]
TINY = Preset(
    name="tiny",
    model=GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16),
    train=TrainConfig(lr=1e-2, batch_size=8, steps=12, eval_every=4),
)
EPOCHS = {"steps": None, "epochs": 2, "batch_size": 256, "eval_every": 3}  # 5 batches an epoch
FUSED = pytest.mark.skipif(
    bool(select.unavailable("cpu", torch.float32)), reason="the compiled extension is not there"
)
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


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


def quick(
    out: str | Path | None = None, chosen: Preset = TINY, text: str | None = TEXT, **options: Any
) -> TrainResult:
    """Trains by a preset on a text, without the progress bar unless `options` asks for it."""
    return train(chosen, out, **{"text": text, "progress": False} | options)


def losses_of(history: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Returns of each evaluation what does not depend on time."""
    return [(row["step"], row["epoch"], row["train_loss"], row["val_loss"]) for row in history]


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Returns the history that a run's directory has."""
    return [json.loads(line) for line in (path / run.HISTORY_NAME).read_text().splitlines()]


def files_in(path: Path) -> set[str]:
    """Returns the names of a directory's files, without those of callbacks."""
    return {file.name for file in path.iterdir() if file.is_file()} - set(run.OTHER_FILES)
