"""Whole training steps on a GPU: their CUDA graph, and what they compute beside a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_steps import assert_same, batch_of, interrupt, losses_of

from gptfast import GPT, GPTConfig, TrainConfig, Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

B, T = 6, 16
MODEL = GPTConfig(block_size=T, vocab_size=37, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
CONFIG = TrainConfig(lr=1e-2, clip=0.5, batch_size=B, weight_decay=0.1, precision="bf16")
STEPS = 6  # of which the fourth is captured: the first makes AdamW's moments
IDS = torch.randint(1, 37, (200,), generator=torch.Generator().manual_seed(7))


def trainer_of(config: TrainConfig, device: str = "cuda", **sizes: Any) -> Trainer:
    """A trainer of a model whose initial weights are always the same."""
    backend = "fused" if device == "cuda" else "reference"
    generator = torch.Generator().manual_seed(3)
    model = GPT(replace(MODEL, **sizes), backend=backend, generator=generator)
    return Trainer(model.to(device), config)


def batch(i: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    idx, targets = batch_of(i, B, T, MODEL.vocab_size)
    return idx.to(device), targets.to(device)


def captured(trainer: Trainer) -> bool:
    """Whether each of a trainer's graphs has been captured, of which there are some."""
    graphs = trainer.graphs._graphs.values()
    return bool(graphs) and all(graph._replay is not None for graph in graphs)


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
    by_graph, plainly = (
        trainer_of(replace(config, graph=graph), **sizes) for graph in ("auto", "off")
    )
    by_graph.total_steps = plainly.total_steps = STEPS
    losses = [(by_graph.step(*batch(i)), plainly.step(*batch(i))) for i in range(STEPS)]
    assert by_graph.graphs.obstacle(by_graph) is None
    assert captured(by_graph) and not plainly.graphs._graphs
    assert all(torch.equal(a, b) for a, b in losses)
    assert_same(by_graph, plainly)


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
    interrupt(monkeypatch, cut)
    first = trainer_of(config)
    assert first.fit(IDS, IDS[:40], out=tmp_path / "run").interrupted
    resumed = trainer_of(config)
    result = resumed.fit(IDS, IDS[:40], out=tmp_path / "run", resume=True)
    assert losses_of(result.history) == losses_of(expected.history) and len(result.history) >= 3
    for trainer in (first, resumed):  # no capture failed, after which steps would have those bits
        assert trainer.graphs.obstacle(trainer) is None
    assert_same(resumed, plainly)


def test_windows_of_a_text_too_large_for_the_device() -> None:
    """They are gathered by the host, with the bits of those that the device gathers."""
    here, there, ids = trainer_of(CONFIG), trainer_of(CONFIG), IDS.cuda()
    for i in range(STEPS):
        starts = torch.randint(150, (B,), generator=torch.Generator().manual_seed(i))
        assert torch.equal(here.step_at(ids, starts), there.step_at(IDS, starts))
    assert captured(here) and captured(there)
    assert_same(here, there)
