"""The files of a run: training state, checksum, version, and which files belong together."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
import training_steps

from gptfast import checkpoint, data
from gptfast.cli import main
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import CheckpointError, ConfigError, DataError
from gptfast.presets import Preset
from gptfast.tokenizer import CharTokenizer
from gptfast.training import Trainer, held_out, run

OLD = Path(__file__).parent / "fixtures" / "checkpoint-v1"
TEXT = data.abc_corpus()[:600]
TINY = Preset(  # the preset of the run in OLD, which was interrupted after 3 of 6 steps
    name="tiny",
    model=GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=8),
    train=TrainConfig(lr=1e-2, batch_size=4, steps=6, eval_every=2),
)
quick = functools.partial(training_steps.quick, chosen=TINY, text=TEXT)


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def rewrite_state(path, change):
    """Changes the training state and writes it without a checksum, as version 1 did."""
    file = path / run.STATE_NAME
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


# ---- versions


def test_a_run_of_version_1_goes_on_to_the_losses_it_would_have_had(old):
    result = quick(old, resume=True)
    wanted = [(2, 1.7318902, 1.5697180), (4, 1.6958185, 1.4333582), (6, 1.4775538, 1.3552959)]
    for row, (step, train_loss, val_loss) in zip(result.history, wanted, strict=True):
        assert row["step"] == step
        assert row["train_loss"] == pytest.approx(train_loss, rel=1e-4)
        assert row["val_loss"] == pytest.approx(val_loss, rel=1e-4)
    assert checkpoint.read_config(old)["version"] == checkpoint.VERSION
    assert quick(old, resume=True).history == result.history  # now saved in the newest version


def test_a_newer_state_gets_a_sentence(old):
    rewrite_state(old, lambda content: content.update(version=run.VERSION + 1))
    with pytest.raises(CheckpointError, match="training_state.pt: written by a newer gptfast"):
        quick(old, resume=True)


def test_a_state_without_its_checksum_is_damaged(tmp_path):
    quick(tmp_path, steps=2)
    rewrite_state(tmp_path, lambda content: None)
    with pytest.raises(CheckpointError, match="training_state.pt: .*lacks its checksum"):
        quick(tmp_path, steps=4, resume=True)


# ---- damage


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"<html><body>404</body></html>", "page of HTML"),
        ("Ünïcode, a text\n".encode(), "damaged"),
        (b"{}", "damaged"),
    ],
)
def test_what_is_no_state_is_named(old, content, reason):
    (old / run.STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"training_state.pt: .*{reason}") as error:
        quick(old, resume=True)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    (old / checkpoint.WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{reason}"):
        checkpoint.load(old)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes by name")
def test_a_text_that_came_by_a_pipe_is_not_waited_for(tmp_path):
    quick(tmp_path / "run", steps=2)
    os.mkfifo(tmp_path / "pipe")
    model, tokenizer = checkpoint.load(tmp_path / "run")
    extra = checkpoint.read_config(tmp_path / "run")["extra"]
    extra |= {"preset": None, "data": str(tmp_path / "pipe")}
    checkpoint.save(model, tokenizer, tmp_path / "run", extra=extra)
    with pytest.raises(DataError, match="its text came by .*pipe, which cannot be read again"):
        held_out(tmp_path / "run")


def test_a_changed_byte_of_the_state_is_found(tmp_path):
    quick(tmp_path, steps=2)
    file = tmp_path / run.STATE_NAME
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), 499):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="training_state.pt: the file is damaged"):
            quick(tmp_path, steps=4, resume=True)
        content[place] ^= 1


def remove(*names):
    def change(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return change


def put(value, *names):
    def change(content):
        for name in names[:-1]:
            content = content[name]
        content[names[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(remove(name) for name in ("model", "train", "weights", "state", "resumable")),
        *(put(None, name) for name in ("model", "train", "weights", "state", "resumable")),
        *(put(5, "resumable", name) for name in ("optimizer", "dropout", "windows")),
        *(remove("resumable", name) for name in ("text", "optimizer", "dropout", "windows")),
        remove("state", "step"),
        put("3", "state", "step"),
        put([1], "state", "history"),
        put([{"step": float("nan")}], "state", "history"),
        put(1, "state", "more"),
        remove("weights", "ln_f.bias"),
        put(5, "weights", "ln_f.bias"),
        put(torch.zeros(9), "weights", "ln_f.bias"),
        put(torch.zeros(8).double(), "weights", "ln_f.bias"),
        put(torch.zeros(9), "resumable", "optimizer", "state", 0, "exp_avg"),
        put("a", "resumable", "optimizer", "state", 0, "exp_avg"),
        put([], "resumable", "optimizer", "param_groups"),
        put(torch.zeros(9, dtype=torch.uint8), "resumable", "windows"),
    ],
)
def test_a_state_that_lacks_something_is_one_sentence(old, change):
    rewrite_state(old, change)
    with pytest.raises(CheckpointError, match="training_state.pt: ") as error:
        quick(old, resume=True)
    assert "\n" not in str(error.value)


# ---- files of different saves


@pytest.fixture
def two(tmp_path):
    """The directories of the same run at step 2 and at step 4."""
    quick(tmp_path / "early", steps=2)
    shutil.copytree(tmp_path / "early", tmp_path / "late")
    quick(tmp_path / "late", steps=4, resume=True)
    return tmp_path / "early", tmp_path / "late"


def copy(names, source, target):
    for name in names:
        shutil.copy(source / name, target)


def test_a_crash_between_the_two_files_of_a_save_does_no_harm(two):
    early, late = two
    whole = quick(early.parent / "whole", steps=4)
    copy([checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME], late, early)
    result = quick(early, steps=4, resume=True)
    assert [row["train_loss"] for row in result.history] == [
        row["train_loss"] for row in whole.history
    ]


def test_files_of_two_saves_are_refused_and_the_state_alone_goes_on(two, tmp_path):
    early, late = two
    quick(tmp_path / "other", steps=4)
    for source in (early, tmp_path / "other"):  # an earlier save, and another run
        copy([checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME], source, late)
        with pytest.raises(CheckpointError, match=r"model.safetensors: .*without .* alone"):
            quick(late, steps=6, resume=True)
    (late / checkpoint.WEIGHTS_NAME).unlink()
    (late / checkpoint.CONFIG_NAME).unlink()
    assert [row["step"] for row in quick(late, steps=6, resume=True).history] == [2, 4, 6]


def test_a_damaged_checkpoint_beside_a_whole_state_says_how_to_go_on(two):
    late = two[1]
    (late / checkpoint.WEIGHTS_NAME).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"damaged .*; without model.safetensors the run"):
        quick(late, steps=6, resume=True)


@pytest.mark.parametrize("steps", (3, 6))
def test_a_crash_after_the_best_checkpoint_gives_no_other_step_for_it(tmp_path, monkeypatch, steps):
    """`best/` is that of step 4, the state that of step 3."""
    save = checkpoint.save

    def killed(model, tokenizer, path, extra=None):
        save(model, tokenizer, path, extra)
        if Path(path).name == run.BEST_NAME and extra["step"] == 4:
            raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", killed)
        with pytest.raises(SystemExit):
            quick(tmp_path / "run", save_every=1)
    best = tmp_path / "run" / run.BEST_NAME
    assert checkpoint.read_config(best)["extra"]["step"] == 4
    result = quick(tmp_path / "run", save_every=1, steps=steps, resume=True)
    if steps == 3:  # it ends before another evaluation: of the one in its history nothing is left
        assert result.best is None
        return
    whole = quick(tmp_path / "whole", save_every=1)
    assert result.best["step"] == checkpoint.read_config(best)["extra"]["step"]
    assert result.best["val_loss"] == whole.best["val_loss"]


# ---- what a run stores besides its model


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ([1], "not known on which text"),
        ("text", "not known on which text"),
        ({}, "not known on which text"),
        ({"preset": ["abc"], "data": 5}, "not known on which text"),
        ({"preset": "abc", "data": None}, "not known which part.*'train'"),
        ({"preset": "abc", "train": [1], "text_sha256": ""}, "not known which part"),
        ({"preset": "abc", "train": {"lr": "x"}, "text_sha256": ""}, "not known which part.*lr"),
        ({"preset": "abc", "train": {"more": 1}, "text_sha256": ""}, "not known which part"),
        ({"preset": "abc", "train": {}}, "not known which part.*'text_sha256'"),
        ({"preset": "abc", "train": {}, "text_sha256": 5}, "abc is no longer the text"),
        ({"data": "a\0b", "train": {}, "text_sha256": ""}, "not known on which text"),
    ],
)
def test_odd_extra_is_one_sentence(tmp_path, capsys, extra, error):
    model, tokenizer = checkpoint.load(OLD)
    checkpoint.save(model, tokenizer, tmp_path, extra)
    with pytest.raises(DataError, match=error) as caught:
        held_out(tmp_path)
    assert "\n" not in str(caught.value)
    assert main(["eval", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("gptfast: ") and told.count("\n") == 1
    assert main(["inspect", str(tmp_path)]) == 0
    assert "extra:\n" in capsys.readouterr().out


def test_halves_of_surrogate_pairs_are_shown_escaped(tmp_path, capsys):
    model, _ = checkpoint.load(OLD)
    checkpoint.save(model, CharTokenizer(("\ud800", "a")), tmp_path, {"no\ud800te": "\udfff"})
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert r"no\ud800te: \udfff" in shown and r"\ud800a" in shown
    shown.encode("utf-8")


def test_a_model_that_no_checkpoint_holds_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *args: pytest.fail("trained"))
    model, _ = checkpoint.load(OLD)
    model.ln_f.eps = 1e-3
    trainer = Trainer(model, TrainConfig(steps=2))
    with pytest.raises(CheckpointError, match="ln_f has eps=0.001"):
        trainer.fit(torch.ones(20, dtype=torch.int64), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_another_tie(old):
    with pytest.raises(ConfigError, match="tie_weights=False and cannot go on with .*=True"):
        quick(old, resume=True, tie_weights=True)
