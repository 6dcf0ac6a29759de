"""Arguments of the wrong kind: one sentence that says what was expected and what came."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast import GPT, ConfigError, GPTConfig, TrainConfig, Trainer
from gptfast.errors import DataError
from gptfast.presets import PRESETS
from gptfast.training.run import check

TINY = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
RECIPE = replace(PRESETS["abc"], model=TINY)
IDS = torch.randint(1, 5, (40,))


def trained(**options: Any) -> Any:
    return gptfast.train(RECIPE, text="ABCA" * 30, steps=1, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: gptfast.train(3), "chosen must be the name of a preset or a Preset, got a int"),
        (lambda: trained(tokenizer="bpe"), "tokenizer must be one, .* got a str"),
        (lambda: trained(callbacks=[gptfast.Callback]), "got the class Callback"),
        (lambda: trained(init_from=GPT(TINY)), "a model must be the path .* got a GPT"),
        (lambda: trained(out=""), "out must be the path .* got an empty one"),
        (
            lambda: gptfast.train(RECIPE, data="hello world " * 100),
            "data must be the path of a file or folder, got 1200 characters",
        ),
        (lambda: gptfast.load(None), "a model must be the path .* got a NoneType"),
        (lambda: gptfast.generate("runs/s", ["A"]), "model must be a GPT .* got a str"),
        (lambda: gptfast.generate(GPT(TINY), ["A"], tokenizer="x"), "tokenizer must be one"),
        (lambda: gptfast.evaluate(GPT(TINY), "text"), "ids must be a tensor of tokens, got a str"),
        (lambda: GPT({"vocab_size": 5}), "config must be a GPTConfig, got a dict"),
        (lambda: Trainer(GPT(TINY), {"steps": 5}), "config must be a TrainConfig, got a dict"),
        (
            lambda: Trainer(GPT(TINY), TrainConfig(steps=1)).fit("ABAB"),
            "the training part of the text must be a tensor of tokens, got a str",
        ),
    ),
)
def test_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_run_without_a_training_state_is_not_said_to_be_resumable(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="say overwrite .it cannot be resumed, it has no train"):
        check(tmp_path, resume=False, overwrite=False)
    (tmp_path / "training_state.pt").touch()
    with pytest.raises(ConfigError, match="or say resume or overwrite$"):
        check(tmp_path, resume=False, overwrite=False)


def test_callbacks_come_from_any_iterable() -> None:
    steps: list[int] = []

    class Notes(gptfast.Callback):
        def on_step(self, run: Any) -> None:
            steps.append(run.state.step)

    trained(callbacks=(each for each in [Notes()]))
    assert steps == [1]


@pytest.mark.parametrize(
    ("options", "resumes"),
    (
        ({"preset": "abc"}, True),
        ({"preset": "abc", "data": __file__}, True),
        ({"preset": "abc", "data": "/dev/fd/3"}, False),  # a pipe
        ({"preset": "mine"}, False),  # of Python
        ({}, False),
    ),
)
def test_a_command_that_resumes_can_be_run(
    options: dict[str, str], resumes: bool, tmp_path: Path
) -> None:
    from gptfast.training.watching.progress import _how_to_resume

    lines = "".join(f"{name} = {value!r}\n" for name, value in options.items())
    (tmp_path / "run.toml").write_text(f"[run]\n{lines}")
    assert (_how_to_resume(tmp_path) != "resume") == resumes


def test_a_text_that_is_too_short_says_how_it_is_divided() -> None:
    with pytest.raises(DataError, match=r"held-out .* text_fraction=1.0, val_fraction=0.01$"):
        trained(val_fraction=0.01)


def test_a_run_does_not_end_before_the_step_it_is_at(tmp_path: Path) -> None:
    trainer = Trainer(GPT(TINY), TrainConfig(steps=4, batch_size=2))
    trainer.fit(IDS, out=tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    shorter = Trainer(GPT(TINY), TrainConfig(steps=2, batch_size=2))
    with pytest.raises(ConfigError, match="the run is at step 4 and cannot end at 2"):
        shorter.fit(IDS, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(gptfast.CheckpointError, match="a GGUF, which gptfast writes and does not"):
        gptfast.load(file)


def test_runs_of_any_name_are_in_the_legend() -> None:
    pytest.importorskip("matplotlib")
    from gptfast.training import plots

    rows = [{"step": 1, "train_loss": 2.0, "val_loss": 2.5, "perplexity": 12.2}] * 2
    figure = plots._draw({"_base": rows, "b $x_1$": rows}, "loss", None)  # type: ignore[dict-item]
    texts = figure.axes[0].get_legend().get_texts()
    assert [each.get_text().strip() for each in texts] == [
        "_base, held-out", "_base, training", "b $x_1$, held-out", "b $x_1$, training",
    ]  # fmt: skip
    assert not any(each.get_parse_math() for each in texts)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gptfast.cli import main

    text = tmp_path / "text.txt"
    text.write_text("ABCA" * 30)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").mkdir()
    out = ["--out", f"{tmp_path / 'run'}"]
    for args, message in (
        (["data", "prepare", f"{tmp_path / 'folder'}", *out], "expected a text file, got a dire"),
        (["data", "prepare", f"{text}", *out, "--processes", "0"], "processes"),
        (["train", "abc", *out, "--threads", "1", "--train.threads", "2"], "are the same: give"),
        (["train", "abc", *out, "--plot", f"{text}/loss.png"], "loss.png: cannot be written"),
        (["train", "abc", *out, "--plot", f"{tmp_path / 'a.png'}"], "a.png: cannot be written"),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_threads_of_the_command_line_win_over_those_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptfast.cli import main

    file = tmp_path / "run.toml"
    file.write_text('[run]\npreset = "abc"\n[train]\nsteps = 1\nthreads = 2\n')
    args = ["train", "--config", f"{file}", "--out"]
    before = torch.get_num_threads()
    try:
        for options, threads in (([], 2), (["--threads", "1"], 1)):
            out = tmp_path / f"run{threads}"
            assert main([*args, f"{out}", *options]) == 0, capsys.readouterr().err
            assert f"\nthreads = {threads}\n" in (out / "run.toml").read_text()
    finally:
        torch.set_num_threads(before)


def test_a_closed_standard_input_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptfast.cli import main

    gptfast.save(GPT(TINY), gptfast.CharTokenizer("ABCD"), tmp_path / "model")
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", f"{tmp_path / 'model'}", "--prompt", "-"]) == 2
    assert "there is no standard input" in capsys.readouterr().err


def test_data_errors_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_full: Any
) -> None:
    from gptfast.cli.commands import data

    monkeypatch.setattr(data, "write_atomic", disk_full)
    with pytest.raises(DataError, match="x.txt: cannot be written .No space left on device"):
        data._write_new(tmp_path / "x.txt", b"a")
