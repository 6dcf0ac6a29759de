"""Whole training steps on a GPU: their CUDA graph, and what they compute beside a CPU."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, TrainConfig, Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

B, T = 6, 16
MODEL = GPTConfig(block_size=T, vocab_size=37, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
CONFIG = TrainConfig(lr=1e-2, clip=0.5, batch_size=B, weight_decay=0.1, precision="bf16")
STEPS = 6  # the third one is captured
IDS = torch.randint(37, (200,), generator=torch.Generator().manual_seed(7))


def trainer_of(config: TrainConfig, device: str = "cuda", **sizes: Any) -> Trainer:
    """A trainer of a model whose initial weights are always the same."""
    backend = "fused" if device == "cuda" else "reference"
    generator = torch.Generator().manual_seed(3)
    model = GPT(replace(MODEL, **sizes), backend=backend, generator=generator)
    return Trainer(model.to(device), config)


def batch(i: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    drawn = torch.randint(37, (2, B, T), generator=torch.Generator().manual_seed(i)).to(device)
    return drawn[0], drawn[1]


def assert_same(a: Trainer, b: Trainer) -> None:
    """Both have the same weights, moments and means, bit by bit."""
    for name, x, y in zip(a.names, a.parameters, b.parameters, strict=True):
        assert torch.equal(x, y), name
        moments = a.optimizer.state[x].values(), b.optimizer.state[y].values()
        assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True)), name
    for x, y in zip(a.optimizer.averages, b.optimizer.averages, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("precision", ("bf16", "fp32"))
@pytest.mark.parametrize(
    ("options", "sizes"),
    (
        ({}, {}),
        ({"clip": None}, {"dropout": 0.0, "attention": False}),
        ({"recompute": True}, {"attn_proj_dropout": True}),
        ({"accumulation_steps": 3}, {"tie_weights": True}),
        ({"ema": 0.9, "decayed": "matrices", "label_smoothing": 0.1}, {"bias": False}),
        ({"recompute": True, "accumulation_steps": 2, "ema": 0.9}, {"gelu": "tanh"}),
        ({"schedule": "cosine", "warmup_steps": 2, "steps": STEPS}, {"n_head": 1}),
    ),
)
def test_a_graph_has_the_bits_of_the_steps_without_one(
    options: dict[str, Any], sizes: dict[str, Any], precision: Any
) -> None:
    config = replace(CONFIG, precision=precision, **options)
    captured, plainly = (
        trainer_of(replace(config, graph=graph), **sizes) for graph in ("auto", "off")
    )
    captured.total_steps = plainly.total_steps = STEPS
    losses = [(captured.step(*batch(i)), plainly.step(*batch(i))) for i in range(STEPS)]
    assert captured.graphs.obstacle(captured) is None
    assert all(graph._replay is not None for graph in captured.graphs._graphs.values())
    assert len(captured.graphs._graphs) == 1 and not plainly.graphs._graphs
    assert all(torch.equal(a, b) for a, b in losses)
    assert_same(captured, plainly)


def test_a_step_is_that_of_a_cpu() -> None:
    """The same weights, dropout masks and losses, but for rounding."""
    config = replace(CONFIG, precision="fp32", lr=1e-3)
    here, there = trainer_of(config), trainer_of(config, "cpu")
    for i in range(STEPS):
        loss = here.step(*batch(i))
        torch.testing.assert_close(loss.cpu(), there.step(*batch(i, "cpu")), rtol=1e-4, atol=0)


@pytest.mark.parametrize("cut", (5, 8))
def test_a_run_with_odd_batches_is_resumed_with_the_same_bits(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch ends with a part of a batch; the run is cut within and after the first one."""
    config = replace(CONFIG, epochs=2, batch_size=30, eval_every=5)
    plainly = trainer_of(replace(config, graph="off"))
    expected = plainly.fit(IDS, IDS[:40])
    step_at: Callable[..., Tensor] = Trainer.step_at
    done: list[int] = []

    def interrupted(self: Trainer, ids: Tensor, starts: Tensor) -> Tensor:
        done.append(1)
        loss = step_at(self, ids, starts)
        if len(done) == cut:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "step_at", interrupted)
    assert trainer_of(config).fit(IDS, IDS[:40], out=tmp_path / "run").interrupted
    resumed = trainer_of(config)
    result = resumed.fit(IDS, IDS[:40], out=tmp_path / "run", resume=True)
    rows = [
        [(row["step"], row["train_loss"], row["val_loss"]) for row in each.history]
        for each in (result, expected)
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 3
    assert_same(resumed, plainly)


def test_windows_of_a_text_too_large_for_the_device() -> None:
    """They are gathered by the host, with the bits of those that the device gathers."""
    here, there = trainer_of(CONFIG), trainer_of(CONFIG)
    for i in range(STEPS):
        starts = torch.randint(150, (B,), generator=torch.Generator().manual_seed(i))
        assert torch.equal(here.step_at(IDS.cuda(), starts), there.step_at(IDS, starts))
    assert_same(here, there)
