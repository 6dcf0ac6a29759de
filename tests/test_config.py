"""The options of a run: which values they take, presets, and how a text is cut."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from training_steps import losses_of, quick

from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import ConfigError
from gptfast.model import GPT
from gptfast.presets import preset
from gptfast.training import Trainer, evaluate, split, train


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", "0.1"),
        ("lr", True),
        ("clip", 0.0),
        ("weight_decay", -1.0),
        ("betas", (0.9, 1.0, 0.5)),
        ("betas", (1.0, 1.0)),
        ("betas", 0.9),
        ("batch_size", 0),
        ("batch_size", None),
        ("steps", 1.5),
        ("epochs", 0),
        ("eval_every", -1),
        ("eval_tokens", 0),
        ("seed", -1),
        ("seed", 1.0),
        ("seed", 2**63),
        ("steps", True),
        ("precision", "fp16"),
        ("text_fraction", 0.0),
        ("text_fraction", 1.1),
        ("val_fraction", 1.0),
        ("threads", 0),
        ("threads", True),
        ("save_every", 0),
        ("save_minutes", 0.0),
        ("save_minutes", "10"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must ") as error:
        TrainConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_a_run_cannot_start_from_the_run_that_it_replaces(tmp_path):
    train("abc", tmp_path / "run", steps=1, n_layer=1, n_embd=8, progress=False)
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="cannot start from the run that it replaces"):
        train("abc", tmp_path / "run", init_from=tmp_path / "run", overwrite=True, steps=1)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept


def test_half_precision_behind_a_float32_embedding_is_refused():
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_embd=8))
    model.h.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"got bfloat16 for h\.0\.ln_1\.weight"):
        Trainer(model, TrainConfig(steps=1, precision="bf16"))


def test_an_evaluation_leaves_every_module_in_its_mode():
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_embd=8)).train()
    model.h[0].mlp.eval()
    evaluate(model, torch.arange(20) % 5)
    assert model.training and not model.h[0].mlp.training and model.h[0].attn.training


def test_counts_may_be_numpys():
    plain = TrainConfig(steps=7, batch_size=3, threads=1, seed=5)
    fields = {"steps": np.int64(7), "batch_size": np.uint8(3), "threads": np.int32(1)}
    config = TrainConfig(**fields, seed=np.int64(5))
    assert json.dumps(asdict(config)) == json.dumps(asdict(plain)) and config == plain


def test_more_threads_than_the_system_starts_are_refused_before_anything_is_written(tmp_path):
    config = TrainConfig(steps=1, threads=100_000)  # may be valid on another machine
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_embd=8))
    with pytest.raises(
        ConfigError, match="threads must be a whole number from 1 to .*, got 100000"
    ):
        Trainer(model, config).fit(torch.arange(40) % 5, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_steps_win_over_epochs():
    history = quick(steps=3, epochs=2, eval_every=None).history
    assert losses_of(history) == losses_of(quick(steps=3, eval_every=None).history)
    assert [row["step"] for row in history] == [3]


def test_a_whole_number_of_numpy_is_one():
    config = TrainConfig(steps=np.int64(3), seed=np.uint8(5), batch_size=np.int32(2))
    assert config == TrainConfig(steps=3, seed=5, batch_size=2)
    assert {type(x) for x in (config.steps, config.seed, config.batch_size)} == {int}


def test_overrides_go_to_model_or_training_and_unknown_ones_are_named():
    changed = preset("abc").override({"n_layer": 3, "vocab_size": 7, "lr": 0.5})
    assert (changed.model.n_layer, changed.model.vocab_size, changed.train.lr) == (3, 7, 0.5)
    assert (changed.model.block_size, changed.train.steps) == (16, 400)
    with pytest.raises(ConfigError, match=r"no option 'learning_rate'.*block_size.*weight_decay"):
        preset("abc").override({"learning_rate": 1.0})
    with pytest.raises(ConfigError, match="n_embd must be divisible by n_head"):
        quick(n_head=3)


def test_the_text_is_cut_as_the_course_cuts_it():
    ids = torch.arange(1_079_918)
    train_ids, val_ids = split(ids, preset("abc").train)
    assert (len(train_ids), len(val_ids), val_ids[0].item()) == (863_934, 215_984, 863_934)
    train_ids, val_ids = split(ids[:1000], preset("shakespeare").train)
    assert (len(train_ids), val_ids[0].item(), val_ids[-1].item()) == (270, 270, 299)
    train_ids, val_ids = split(ids, TrainConfig(val_fraction=0.0))
    assert len(train_ids) == len(ids) and val_ids is None
