"""Training: configs and presets, one step, evaluation, whole runs, interrupts, resuming, errors."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from small_models import assert_same_weights, small_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from training_steps import EPOCHS, FUSED, SIGNALS, TEXT, files_in, losses_of, quick, rows_in

from gptfast import checkpoint, data, files, lock
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import CheckpointError, ConfigError, DataError
from gptfast.model import GPT
from gptfast.presets import preset
from gptfast.tokenizer import CharTokenizer
from gptfast.training import (
    Trainer,
    TrainError,
    UnsavedError,
    evaluate,
    held_out,
    loop,
    run,
    split,
    train,
)

# ---- configs and presets


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


# ---- one step and the evaluation


def test_a_step_is_torchs_adamw_on_the_models_loss():
    # In float64, because AdamW normalises even gradients that consist only of rounding errors.
    model, other = small_model(dropout=0.0).double(), small_model(dropout=0.0).double()
    trainer = Trainer(model, TrainConfig(lr=1e-2, clip=0.1, weight_decay=0.5, betas=(0.8, 0.9)))
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.5, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        idx, targets = torch.randint(1, 5, (2, 4, 8), generator=generator).unbind()
        loss = trainer.step(idx, targets)
        expected = torch.nn.functional.cross_entropy(other(idx).flatten(0, 1), targets.flatten())
        adamw.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        adamw.step()
        assert loss.shape == () and not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), check_dtype=False)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not model.wte.weight[0].any()


class CountOps(TorchDispatchMode):
    """Counts the operators that torch runs, except detach."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@FUSED
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16"}, {"decayed": "matrices", "ema": 0.99}]
)
def test_a_step_runs_few_operators(options):
    """An operator costs microseconds, which matter for small models; new ones must fail here."""
    trainer = Trainer(small_model(n_layer=2), TrainConfig(clip=1.0, **options))
    idx = torch.ones(4, 8, dtype=torch.int64)
    trainer.step(idx, idx)  # creates AdamW's state
    with CountOps() as mode:
        trainer.step(idx, idx)
    once = ["embedding", "embedding_backward", "linear_cross_entropy", "adamw_"]
    per_layer = ["self_attention", "self_attention_backward", "ffn", "ffn_backward"]
    allowed = Counter(
        {f"gptfast::{name}": 1 for name in once} | {f"gptfast::{name}": 2 for name in per_layer}
    )
    allowed += Counter(
        {
            "aten::randint.generator": 1,  # the dropout's key
            "aten::ones_like": 1,  # the gradient of the loss
            "aten::_local_scalar_dense": 1,  # checks whether that gradient is 1
        }
    )
    assert mode.counts["gptfast::adamw_"] == 1
    assert mode.counts - allowed == Counter()


def test_labels_are_smoothed_in_training_alone():
    idx, targets = torch.randint(1, 5, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    model = small_model(dropout=0.0)
    smoothed = model.loss(idx, targets, label_smoothing=0.2).item()
    evaluated = evaluate(model, idx[0]).loss
    trainer = Trainer(model, TrainConfig(label_smoothing=0.2))
    assert trainer.evaluate(idx[0]).loss == evaluated
    assert trainer.step(idx, targets).item() == smoothed != evaluate(model, idx[0]).loss


def test_a_step_trains_with_dropout_whatever_mode_the_model_was_in():
    trainer = Trainer(small_model(dropout=0.5).eval(), TrainConfig(lr=1e-9))
    idx = torch.ones(4, 8, dtype=torch.int64)
    assert trainer.step(idx, idx) != trainer.step(idx, idx)


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 41])
def test_evaluation_is_the_mean_over_all_tokens_of_disjoint_windows(tokens, monkeypatch):
    monkeypatch.setattr(
        "gptfast.training.evaluation.EVAL_TOKENS_AT_ONCE", 16
    )  # two windows at once
    model = small_model(dropout=0.5)
    ids = torch.randint(1, 5, (tokens,), generator=torch.Generator().manual_seed(1))
    result = evaluate(model, ids)
    assert model.training  # the mode is restored
    model.eval()
    total = 0.0
    for start in range(0, tokens - 1, 8):
        x, y = ids[start : start + 8][: tokens - 1 - start], ids[start + 1 : start + 9]
        log_p = model(x[None])[0].detach().double().log_softmax(-1)
        total -= log_p[torch.arange(len(y)), y].sum().item()
    assert result.tokens == tokens - 1
    assert result.loss == pytest.approx(total / (tokens - 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("ids", [torch.ones(1).long(), torch.ones(9), torch.ones(3, 9).long()])
def test_evaluation_refuses_what_is_no_text(ids):
    with pytest.raises(DataError, match="1-D tensor of at least 2 tokens"):
        evaluate(small_model(), ids)
    with pytest.raises(ConfigError, match="'fp32', 'bf16'.*'half'"):
        evaluate(small_model(), torch.ones(9).long(), "half")


def test_weights_in_half_precision_are_refused():
    with pytest.raises(ConfigError, match="float32 weights.*got bfloat16"):
        Trainer(small_model().bfloat16(), TrainConfig())


def test_a_model_of_which_nothing_is_trained_is_refused():
    with pytest.raises(ConfigError, match="nothing to train: all parameters .* frozen"):
        Trainer(small_model().requires_grad_(False), TrainConfig())
    with pytest.raises(ConfigError, match=r"expected a GPT, .*got a Linear"):
        Trainer(torch.nn.Linear(2, 2), TrainConfig())


# ---- random numbers


@pytest.mark.parametrize(
    "options", [{}, {"init": "gpt2"}, {"tie_weights": True}, {"bias": False, "attention": False}]
)
def test_initial_weights_are_drawn_from_a_generator(options):
    expected = small_model(seed=3, **options)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    drawn = GPT(expected.config, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(drawn, expected)


def test_a_loss_takes_the_key_of_its_dropout():
    model, idx = small_model(dropout=0.5), torch.ones(4, 8, dtype=torch.int64)
    before = torch.get_rng_state()
    losses = [model.loss(idx, idx, seed=seed) for seed in (5, torch.tensor(5), 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(model(idx, targets=idx, seed=5), losses[0])
    assert torch.equal(model(idx, seed=5), model(idx, seed=5))
    torch.manual_seed(1)
    drawn = model.loss(idx, idx)  # from torch's default generator
    torch.manual_seed(1)
    assert model.loss(idx, idx) == drawn != model.loss(idx, idx)


def test_a_trainers_random_numbers_are_its_own():
    idx = torch.ones(4, 8, dtype=torch.int64)
    found = []
    for seed in (1, 2):
        trainer = Trainer(small_model(dropout=0.5), TrainConfig(seed=3))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append([trainer.step(idx, idx).item() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=FUSED), "reference"])
def test_runs_in_several_threads_are_those_of_each_alone(backend):
    seeds = (1, 1, 2)
    options = {"backend": backend, "steps": 30, "dropout": 0.3}
    alone = {seed: quick(seed=seed, **options) for seed in set(seeds)}
    before = torch.get_rng_state()
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(lambda seed: quick(seed=seed, **options), seeds))
    assert torch.equal(torch.get_rng_state(), before)
    for seed, result in zip(seeds, together, strict=True):
        assert losses_of(result.history) == losses_of(alone[seed].history)
        assert_same_weights(result.model, alone[seed].model)


# ---- models inside wrappers


class CountedForwards(torch.nn.DataParallel):
    """Counts calls of `forward`, which without a GPU only calls the model."""

    def __init__(self, module):
        super().__init__(module)
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [CountedForwards, lambda m: torch.compile(m, backend="eager")],
    ids=["DataParallel", "torch.compile"],
)
def test_a_wrapped_model_trains_as_it_does_alone(tmp_path, wrap):
    ids = CharTokenizer.from_text(TEXT).encode_tensor(TEXT)
    config = TrainConfig(lr=1e-2, batch_size=8, steps=6, eval_every=3)
    alone = Trainer(small_model(), config).fit(ids[:1000], ids[1000:])
    wrapped = wrap(small_model())
    result = Trainer(wrapped, config).fit(ids[:1000], ids[1000:], out=tmp_path / "run")
    assert type(result.model) is GPT and not wrapped.training
    assert losses_of(result.history) == losses_of(alone.history)
    assert_same_weights(checkpoint.load(tmp_path / "run")[0], alone.model)
    assert evaluate(wrapped, ids[1000:]).loss == result.history[-1]["val_loss"]
    assert getattr(wrapped, "calls", 6) == 6  # each step's forward is the wrapper's
    resumed = Trainer(wrap(small_model(seed=5)), TrainConfig(**{**vars(config), "steps": 9}))
    longer = resumed.fit(ids[:1000], ids[1000:], out=tmp_path / "run", resume=True)
    assert losses_of(longer.history)[:2] == losses_of(alone.history)


def test_gradients_of_several_processes_meet(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed part")
    idx = torch.randint(1, 5, (4, 8), generator=torch.Generator().manual_seed(1))
    expected = small_model()
    Trainer(expected, TrainConfig()).step(idx, idx)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        wrapped, reduced = DistributedDataParallel(small_model()), []

        def note(state, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, note)
        Trainer(wrapped, TrainConfig()).step(idx, idx)
    finally:
        torch.distributed.destroy_process_group()
    assert sum(reduced) == sum(param.numel() for param in expected.parameters())
    assert_same_weights(wrapped.module, expected)


# ---- whole runs


@pytest.mark.parametrize("options", [{}, EPOCHS])
def test_a_run_writes_history_and_checkpoint(tmp_path, options):
    result = quick(tmp_path / "run", **options)
    steps = [4, 8, 12] if not options else [3, 6, 9, 10]
    assert [row["step"] for row in result.history] == steps
    assert result.history == rows_in(tmp_path / "run")
    windows = len(TEXT) * 9 // 10 - 8
    per_epoch = math.ceil(windows / options.get("batch_size", 8))
    for row in result.history:
        assert set(row) == {
            *("step", "epoch", "train_loss", "val_loss", "perplexity"),
            *("tokens_per_s", "seconds", "lr"),
        }
        assert row["epoch"] == pytest.approx(row["step"] / per_epoch, abs=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        assert row["tokens_per_s"] > 0 and row["lr"] == 1e-2
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert not result.interrupted and not result.model.training
    model, tokenizer = checkpoint.load(tmp_path / "run")
    assert tokenizer == result.tokenizer == CharTokenizer.from_text(TEXT)
    assert_same_weights(model, result.model)
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == steps[-1]


def test_an_epoch_trains_on_each_window_once(monkeypatch):
    seen = []
    step = Trainer.step

    def note(self, idx, targets):
        seen.extend(torch.cat([idx, targets[:, -1:]], 1).tolist())
        return step(self, idx, targets)

    monkeypatch.setattr(Trainer, "step", note)
    ids = torch.arange(1, 51)
    model = small_model(vocab_size=51)
    Trainer(model, TrainConfig(epochs=2, batch_size=16)).fit(ids)
    windows = ids.unfold(0, 9, 1).tolist()
    assert sorted(seen[: len(windows)]) == sorted(seen[len(windows) :]) == windows
    assert seen[: len(windows)] != seen[len(windows) :]


def test_evaluations_before_the_last_read_a_part_of_the_held_out_text(monkeypatch):
    read = []
    monkeypatch.setattr(
        Trainer,
        "evaluate",
        lambda self, ids: read.append(len(ids)) or evaluate(self.model, ids),
    )
    quick(eval_tokens=20)
    assert read == [21, 21, 120, 21]  # the last is also compared with the others, to find the best


def test_nothing_held_out_gives_no_held_out_loss():
    history = quick(val_fraction=0.0).history
    assert [row["val_loss"] for row in history] == [None] * 3 == [r["perplexity"] for r in history]


def test_equal_seeds_give_equal_bits_and_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(1)
    first = quick()
    drawn = torch.rand(3)
    torch.manual_seed(2)
    second = quick()
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert losses_of(first.history) == losses_of(second.history)
    assert_same_weights(first.model, second.model)
    assert losses_of(quick(seed=7).history) != losses_of(first.history)


def test_threads_are_set_for_the_run_alone(monkeypatch):
    before, during = torch.get_num_threads(), set()
    step = Trainer.step

    def note(self, idx, targets):
        during.add(torch.get_num_threads())
        return step(self, idx, targets)

    monkeypatch.setattr(Trainer, "step", note)
    quick(threads=before + 1)
    assert during == {before + 1} and torch.get_num_threads() == before


@FUSED
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_any_number_of_threads_trains_to_the_same_bits(precision):
    # One head with several blocks of keys, and weight gradients of two parts of rows.
    options = {"block_size": 300, "n_head": 1, "batch_size": 3, "steps": 2, "eval_every": 2}
    options["text"] = data.abc_corpus()[:8000]
    one, *others = (quick(threads=n, precision=precision, **options) for n in (1, 2, 3))
    for other in others:
        assert losses_of(other.history) == losses_of(one.history)
        assert_same_weights(other.model, one.model)


def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights():
    full, half = quick(steps=40, eval_every=20), quick(steps=40, eval_every=20, precision="bf16")
    assert half.model.wte.weight.dtype == torch.float32
    assert losses_of(full.history) != losses_of(half.history)
    for a, b in zip(full.history, half.history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.02)
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=0.02)


@FUSED
@pytest.mark.parametrize("options", [{}, {"attention": False}, {"tie_weights": True}])
def test_fused_and_reference_train_alike(options):
    fused = quick(backend="fused", dropout=0.3, **options)
    reference = quick(backend="reference", dropout=0.3, **options)
    for a, b in zip(fused.history, reference.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)


def test_a_text_file_serves_every_preset(tmp_path):
    random.seed(1)
    text = "".join(random.choices("äöü\nxyz", k=2000))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8", newline="")
    result = train(
        *("shakespeare", tmp_path / "run"),
        **{"data": file, "progress": False, "n_embd": 8, "steps": 2, "text_fraction": 1.0},
    )
    assert result.model.config.vocab_size == 8
    assert torch.equal(held_out(tmp_path / "run"), result.tokenizer.encode_tensor(text)[1800:])
    file.write_text(text[::-1], encoding="utf-8", newline="")
    with pytest.raises(DataError, match=r"text\.txt is no longer the text"):
        held_out(tmp_path / "run")


def test_the_held_out_text_of_a_given_text_is_not_known(tmp_path):
    quick(tmp_path / "run", steps=1)
    with pytest.raises(DataError, match="not known on which text"):
        held_out(tmp_path / "run")


def test_the_preset_has_its_own_text(tmp_path, shakespeare_path, monkeypatch):
    monkeypatch.setenv("GPTFAST_DATA_DIR", str(shakespeare_path.parent))
    options = {"steps": 1, "n_embd": 8, "n_layer": 1, "eval_tokens": 64, "progress": False}
    result = train("shakespeare", tmp_path / "run", **options)
    assert result.model.config.vocab_size == 66
    assert len(held_out(tmp_path / "run")) == 33_462


def test_a_loss_is_read_while_the_next_step_runs_but_for_saves(tmp_path, monkeypatch):
    seen = []
    step, later = Trainer.step, loop.Later

    class Noted(later):
        def __init__(self, value):
            super().__init__(value)
            self.number = sum(each == "start" for each, _ in seen)

        def value(self):
            seen.append(("read", self.number))
            return super().value()

    def note(self, idx, targets):
        seen.append(("start", sum(each == "start" for each, _ in seen) + 1))
        return step(self, idx, targets)

    monkeypatch.setattr(loop, "Later", Noted)
    monkeypatch.setattr(Trainer, "step", note)
    result = quick(tmp_path / "run", steps=5, eval_every=3)
    order = [f"{each[0]}{number}" for each, number in seen]
    assert " ".join(order) == "s1 s2 r1 s3 r2 r3 s4 s5 r4 r5"
    assert [row["step"] for row in result.history] == [3, 5]


def test_progress_shows_evaluations_on_stderr(capsys):
    quick(progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 4: train loss" in shown.err and "held-out loss" in shown.err
    assert "12/12" in shown.err and "tokens/s" in shown.err


# ---- interrupts and resuming


@pytest.mark.parametrize("options", [{}, EPOCHS])
@pytest.mark.parametrize("pressed", [2, 5, 6, 9])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, ctrl_c, capsys, options, pressed):
    whole = quick(tmp_path / "whole", **options)
    ctrl_c(pressed)
    part = quick(tmp_path / "run", progress=True, **options)
    assert part.interrupted
    assert f"interrupted at step {pressed} of" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_weights(checkpoint.load(tmp_path / "run")[0], part.model)
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [
        row["step"] for row in whole.history if row["step"] <= pressed
    ]
    torch.manual_seed(99)
    result = quick(tmp_path / "run", resume=True, **options)
    assert not result.interrupted
    saved = rows_in(tmp_path / "run")
    assert losses_of(result.history) == losses_of(whole.history) == losses_of(saved)
    assert_same_weights(result.model, whole.model)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_asks_for_the_end_saves_the_run(tmp_path, press, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    press(number, 5)
    part = quick(tmp_path / "run")
    assert part.interrupted and part.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 5
    result = quick(tmp_path / "run", resume=True)
    assert not result.interrupted and result.signal is None
    assert losses_of(result.history) == losses_of(quick().history)


def test_a_signal_in_the_last_step_is_told(press):
    press(signal.SIGTERM, 12)
    result = quick()
    assert not result.interrupted and result.signal == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_a_programs_own_handlers_are_left_alone(press, number):
    heard = []
    signal.signal(number, lambda *_: heard.append(1))
    press(number, 2, 5)
    result = quick()
    assert (heard, result.interrupted, result.signal) == ([1, 1], False, None)
    signal.signal(number, signal.SIG_IGN)
    assert not quick().interrupted and signal.getsignal(number) == signal.SIG_IGN


def test_a_second_ctrl_c_acts_at_once_and_keeps_the_last_checkpoint(tmp_path, ctrl_c, monkeypatch):
    ctrl_c(6)
    ending = run.RunDirectory.save

    def save(self, *args):
        if args[3].step == 6:
            signal.raise_signal(signal.SIGINT)
        ending(self, *args)

    monkeypatch.setattr(run.RunDirectory, "save", save)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "run")
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 4


def test_a_finished_run_can_be_made_longer(tmp_path):
    whole = quick(tmp_path / "whole", steps=12)
    quick(tmp_path / "run", steps=8)
    result = quick(tmp_path / "run", steps=12, resume=True)
    assert losses_of(result.history) == losses_of(whole.history)
    again = quick(tmp_path / "run", steps=12, resume=True)
    assert again.history == result.history and not again.interrupted


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.5}, "started with lr=0.01 and cannot go on with lr=0.5"),
        ({"n_layer": 2}, "n_layer=1 and cannot go on with n_layer=2"),
        ({"steps": None, "epochs": 1}, "steps=12 and cannot go on with steps=None"),
        ({"text": TEXT[5:]}, "another text"),
    ],
)
def test_a_run_goes_on_only_as_it_was_started(tmp_path, options, message):
    quick(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        quick(tmp_path / "run", resume=True, **options)


@pytest.mark.parametrize("options", [{}, EPOCHS])
def test_saves_between_evaluations_change_nothing_and_lose_nothing(
    tmp_path, after_step, monkeypatch, options
):
    whole = quick(tmp_path / "whole", **options)
    saved, save = [], run.RunDirectory.save

    def note(self, *args):
        saved.append(args[3].step)
        save(self, *args)

    monkeypatch.setattr(run.RunDirectory, "save", note)
    often = quick(tmp_path / "often", save_every=2, save_minutes=None, **options)
    rows = [row["step"] for row in whole.history]
    assert saved == sorted({*rows, *range(2, rows[-1] + 1, 2)})
    assert losses_of(often.history) == losses_of(whole.history)
    assert_same_weights(often.model, whole.model)

    def stop():
        raise SystemExit

    after_step(stop, 8)
    with pytest.raises(SystemExit):
        quick(tmp_path / "run", save_minutes=1e-9, **options)  # at each step
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 7
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [n for n in rows if n < 8]
    result = quick(tmp_path / "run", resume=True, **options)
    assert losses_of(result.history) == losses_of(whole.history)
    assert_same_weights(result.model, whole.model)


def test_without_an_interval_only_evaluations_save(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(run.RunDirectory, "save", lambda self, *args: saved.append(args[3].step))
    clock = iter(range(0, 10**6, 7 * 60))  # seven minutes pass between two readings
    monkeypatch.setattr("gptfast.training.loop.time.monotonic", lambda: next(clock))
    quick(tmp_path / "none", save_minutes=None, eval_every=12)
    assert saved == [12]
    saved.clear()
    quick(tmp_path / "ten", eval_every=12)  # a save is due after fourteen minutes, not after seven
    assert saved == [2, 4, 6, 8, 10, 12]


def test_a_state_of_before_the_names_were_noted_is_resumed(tmp_path):
    quick(tmp_path / "run", steps=8)
    state = torch.load(tmp_path / "run" / run.STATE_NAME, weights_only=True)
    state["version"] = 1
    del state["resumable"]["trained"], state["train"]["save_every"], state["train"]["save_minutes"]
    torch.save(state, tmp_path / "run" / run.STATE_NAME)
    result = quick(tmp_path / "run", resume=True)
    assert losses_of(result.history) == losses_of(quick().history)


def test_a_run_goes_on_with_the_parameters_that_it_trained(tmp_path):
    def fit(frozen, **options):
        model = small_model()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        config = TrainConfig(steps=2, batch_size=4)
        return Trainer(model, config).fit(torch.ones(20).long(), out=tmp_path / "run", **options)

    before = small_model().wpe.weight
    assert torch.equal(fit(["wpe.weight"]).model.wpe.weight, before)
    fit(["wpe.weight"], resume=True)
    with pytest.raises(ConfigError, match="started with other parameters frozen"):
        fit(["wte.weight"], resume=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_matrices_alone_decay_and_the_averages_are_resumed(tmp_path, backend):
    def trained(steps, **options):
        config = TrainConfig(steps=steps, batch_size=4, decayed="matrices", ema=0.9, clip=0.1)
        model = small_model()
        model.backend = backend
        trainer = Trainer(model, config)
        trainer.fit(torch.arange(40) % 5, **options)
        return trainer

    whole = trained(6)
    trained(3, out=tmp_path / "run")
    resumed = trained(6, out=tmp_path / "run", resume=True)
    for trainer in whole, resumed:
        for name, param in zip(trainer.names, trainer.parameters, strict=True):
            assert trainer.gpt.get_parameter(name) is param
        groups = trainer.optimizer.param_groups
        decays = [(group["weight_decay"], p.dim() > 1) for group in groups for p in group["params"]]
        assert set(decays) == {(0.01, True), (0.0, False)}
    averages = whole.optimizer.averages
    assert len(averages) == len(whole.parameters)
    for average, again in zip(averages, resumed.optimizer.averages, strict=True):
        assert torch.equal(average, again)


# ---- from the model of another run


def test_a_run_starts_from_the_model_of_another_one(tmp_path):
    quick(tmp_path / "old", n_embd=32, n_head=4, dropout=0.3)
    old, tokenizer = checkpoint.load(tmp_path / "old")
    found = {"init_from": tmp_path / "old", "text": TEXT[100:900]}
    result = quick(tmp_path / "new", steps=4, lr=1e-9, weight_decay=0.0, **found)
    assert result.model.config == old.config and result.tokenizer == tokenizer
    for a, b in zip(result.model.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    extra = checkpoint.read_config(tmp_path / "new")["extra"]
    assert extra["init_from"] == str(tmp_path / "old") and extra["train"]["lr"] == 1e-9
    other = quick(steps=4, dropout=0.0, precision="bf16", **found)
    assert (other.model.config.dropout, old.config.dropout) == (0.0, 0.3)
    assert checkpoint.read_config(tmp_path / "old")["extra"]["init_from"] is None


@pytest.mark.parametrize("again", [{}, {"init_from": True}])
def test_a_run_from_another_one_is_resumed_by_its_own_state(tmp_path, ctrl_c, again):
    quick(tmp_path / "old", n_embd=32)
    whole = quick(init_from=tmp_path / "old", dropout=0.1)
    ctrl_c(6)
    assert quick(tmp_path / "new", init_from=tmp_path / "old", dropout=0.1).interrupted
    options = {"init_from": tmp_path / "old"} if again else {}
    if not again:
        shutil.rmtree(tmp_path / "old")
    result = quick(tmp_path / "new", resume=True, **options)
    assert losses_of(result.history) == losses_of(whole.history)
    assert_same_weights(result.model, whole.model)
    with pytest.raises(ConfigError, match=r"started with init_from='.*old' and cannot go on with"):
        quick(tmp_path / "new", resume=True, init_from=tmp_path / "another")
    with pytest.raises(ConfigError, match="dropout=0.1 and cannot go on with dropout=0.4"):
        quick(tmp_path / "new", resume=True, dropout=0.4)


def test_what_does_not_fit_the_model_to_start_from_is_refused(tmp_path):
    path, bare = tmp_path / "old", tmp_path / "bare"
    quick(path)
    checkpoint.save(checkpoint.load(path)[0].bfloat16(), None, bare)
    for options, error, message in (
        ({"n_layer": 2}, ConfigError, "the model has n_layer=1 and a run .* have n_layer=2"),
        ({"n_layer": 0}, ConfigError, "n_layer must be a positive whole number, got 0"),
        ({"text": "abc" * 99}, DataError, "character 'a' at position 0"),
        ({"tokenizer": CharTokenizer(("A", "B"))}, ConfigError, "another tokenizer"),
        ({"init_from": tmp_path / "none"}, CheckpointError, "no such checkpoint"),
        ({"init_from": bare}, ConfigError, "the model has no tokenizer"),
        (
            {"init_from": bare, "tokenizer": CharTokenizer.from_text("abcdefgh")},
            ConfigError,
            "another tokenizer",
        ),
    ):
        with pytest.raises(error, match=message):
            quick(tmp_path / "new", **{"init_from": path} | options)
        assert not (tmp_path / "new").exists()
    known = CharTokenizer.from_text(TEXT)
    result = quick(init_from=bare, tokenizer=known, steps=1)  # of weights in bfloat16
    assert result.model.wte.weight.dtype == torch.float32


# ---- the run's directory


def test_a_run_is_not_replaced_unasked(tmp_path):
    quick(tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match="run already holds a run"):
        quick(tmp_path / "run", steps=2)
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [1]
    quick(tmp_path / "run", steps=2, overwrite=True)
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [2]
    with pytest.raises(ConfigError, match="not both"):
        quick(tmp_path / "run", overwrite=True, resume=True)


def test_other_files_in_the_directory_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    quick(tmp_path, steps=1)
    quick(tmp_path, steps=1, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert files_in(tmp_path) == {"notes.txt", *run.FILES}


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        quick(tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="needs the directory"):
        quick(resume=True)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_place_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *a: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="file is not a directory"):
            quick(out)
    if os.path.isdir("/proc/self"):  # even root cannot make a directory there
        with pytest.raises(CheckpointError, match="cannot be written there"):
            quick("/proc/self/run")


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch, disk_full):
    quick(tmp_path / "run", steps=4)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", disk_full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            quick(tmp_path / "run", steps=8, resume=True)
    assert files_in(tmp_path / "run") == set(run.FILES)
    result = quick(tmp_path / "run", steps=8, resume=True)
    assert losses_of(result.history) == losses_of(quick(steps=8).history)


def test_a_failed_save_costs_nothing(tmp_path, monkeypatch, disk_full):
    write, failing = files._write, [2, 3]  # of the saves at steps 4, 8, 12

    def full(path, content, durable):
        if path.name.startswith(checkpoint.WEIGHTS_NAME) and path.parent.name != run.BEST_NAME:
            saves.append(1)
            if len(saves) in failing:
                disk_full()
        write(path, content, durable)

    monkeypatch.setattr(files, "_write", full)
    saves = []
    whole = quick()
    with (
        pytest.warns(UserWarning, match="save at step 8 failed, training goes on: .*No space"),
        pytest.raises(UnsavedError, match="at step 12 failed.*`result`: .*No space") as caught,
    ):
        quick(tmp_path / "run")
    result = caught.value.result
    assert isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)
    assert losses_of(result.history) == losses_of(whole.history) and not result.model.training
    assert_same_weights(result.model, whole.model)
    # History and checkpoint are of step 4, from which the run continues.
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [4]
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 4
    failing[:] = []
    assert losses_of(quick(tmp_path / "run", resume=True).history) == losses_of(whole.history)


def test_a_save_after_a_failed_one_has_all_rows(tmp_path, monkeypatch, capsys, disk_full):
    save, saves = torch.save, []

    def full(*args):
        saves.append(1)
        if len(saves) == 1:
            disk_full()
        save(*args)

    monkeypatch.setattr(torch, "save", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning goes to the terminal instead
        quick(tmp_path / "run", progress=True)
    assert "warning: the save at step 4 failed, training goes on: " in capsys.readouterr().err
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [4, 8, 12]


def test_what_cannot_be_saved_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *a: pytest.fail("trained"))
    trainer = Trainer(small_model(), TrainConfig(steps=1))
    with pytest.raises(TypeError, match="JSON"):
        trainer.fit(torch.ones(20).long(), out=tmp_path / "run", extra={"x": {1, 2}})
    assert not (tmp_path / "run").exists()


LOCKS = pytest.mark.skipif(lock.fcntl is None, reason="this system has no flock")


@LOCKS
def test_two_runs_do_not_share_a_directory(tmp_path, after_step):
    path, refused = tmp_path / "run", []

    def second():
        for options in ({"overwrite": True}, {"resume": True}, {"overwrite": True, "steps": 1}):
            with pytest.raises(ConfigError, match=r"run: another run is being trained there$"):
                quick(path, **options)
            refused.append(1)
        model, _ = checkpoint.load(path)  # reading needs no lock
        assert model.config.n_embd == 16 and len(rows_in(path)) == 1

    after_step(second, 6)
    result = quick(path)
    assert len(refused) == 3 and losses_of(result.history) == losses_of(quick().history)
    assert files_in(path) == set(run.FILES)
    after_step(lambda: None)
    assert quick(path, resume=True, steps=13).history[-1]["step"] == 13


@LOCKS
def test_of_runs_started_at_once_one_trains(tmp_path):
    start = threading.Barrier(4)

    def attempt(seed):
        start.wait()
        try:
            return quick(tmp_path / "run", seed=seed)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, range(4)))
    errors = [result for result in results if isinstance(result, str)]
    assert len(errors) == 3 and all("run" in error for error in errors)
    (only,) = (result for result in results if not isinstance(result, str))
    assert rows_in(tmp_path / "run") == only.history
    assert_same_weights(checkpoint.load(tmp_path / "run")[0], only.model)


@LOCKS
def test_a_dead_process_keeps_no_lock(tmp_path):
    hold = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    path = tmp_path / run.LOCK_NAME
    for ending in ("os.kill(os.getpid(), 9)", "print('held', flush=True); sys.stdin.read()"):
        process = subprocess.Popen(
            [sys.executable, "-c", hold + ending, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if "held" in ending:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match="another run is being trained"):
                quick(tmp_path)
            process.kill()
        process.communicate()
        assert path.exists()  # it exists but contains no run
    quick(tmp_path, steps=1)


@LOCKS
@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_takes_runs(tmp_path, monkeypatch, name):
    def flock(*args):
        raise OSError(getattr(errno, name), "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    quick(tmp_path / "run", steps=1)
    assert files_in(tmp_path / "run") == set(run.FILES)


@LOCKS
def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"run: .* \(Read-only file system\)$"):
        quick(tmp_path / "run", steps=1)


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 torn"])
def test_a_damaged_state_is_one_sentence(tmp_path, content):
    quick(tmp_path / "run", steps=1)
    (tmp_path / "run" / run.STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or unreadable") as error:
        quick(tmp_path / "run", steps=2, resume=True)
    assert "\n" not in str(error.value)


def test_a_foreign_state_is_refused(tmp_path):
    quick(tmp_path / "run", steps=1)
    torch.save({"weights": {}}, tmp_path / "run" / run.STATE_NAME)
    with pytest.raises(CheckpointError, match="not a training state of gptfast"):
        quick(tmp_path / "run", steps=2, resume=True)


# ---- errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"text": ""}, DataError, "empty"),
        ({"text": "abcabca"}, DataError, "training part .* shorter than a window: it has 6 tokens"),
        ({"text": "abc" * 9}, DataError, "held-out part .* has 3 tokens, a window needs 9"),
        ({"text": "ab", "data": "f"}, ConfigError, "not both"),
        ({"text": None}, ConfigError, "no text of its own"),
        ({"text": None, "data": "missing.txt"}, DataError, "missing.txt: no such file"),
        ({"vocab_size": 2}, ConfigError, "vocab_size must be at least the tokenizer's 5, got 2"),
        ({"tokenizer": CharTokenizer(("A",))}, DataError, "character 'B' at position"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_directory(tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        quick(tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_fit_needs_a_length():
    with pytest.raises(ConfigError, match="steps or of epochs"):
        Trainer(small_model(), TrainConfig()).fit(torch.ones(20).long())


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    step, done = Trainer.step, []

    def diverge(self, idx, targets):
        done.append(1)
        return step(self, idx, targets) * (math.nan if len(done) == 7 else 1.0)

    monkeypatch.setattr(Trainer, "step", diverge)
    with pytest.raises(TrainError, match=r"loss became nan at step 7: a lower lr .*run keeps"):
        quick(tmp_path / "run")
    model, _ = checkpoint.load(tmp_path / "run")
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 4
    assert all(param.isfinite().all() for param in model.parameters())


def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path, ctrl_c, monkeypatch):
    ctrl_c(6)
    step, done = Trainer.step, []

    def spoil(self, idx, targets):
        loss = step(self, idx, targets)
        done.append(1)
        if len(done) == 6:
            self.gpt.wpe.weight.data[0] = math.inf
        return loss

    monkeypatch.setattr(Trainer, "step", spoil)
    with pytest.raises(TrainError, match=r"weights are no longer finite at step 6.*run keeps"):
        quick(tmp_path / "run")
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(TrainError, match="weights are no longer finite at step 1"):
        quick(tmp_path / "run", steps=1, lr=1e308)
    assert not (tmp_path / "run" / checkpoint.WEIGHTS_NAME).exists()
