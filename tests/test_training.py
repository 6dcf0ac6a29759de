"""Whole runs: what they write and compute, and what ends them with an error."""

import math
import random

import pytest
import torch
from small_models import assert_same_weights, small_model
from training_steps import EPOCHS, FUSED, TEXT, losses_of, quick, rows_in

from gptfast import checkpoint, data
from gptfast.config import TrainConfig
from gptfast.errors import ConfigError, DataError
from gptfast.tokenizer import CharTokenizer
from gptfast.training import Trainer, TrainError, evaluate, held_out, loop, train

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
