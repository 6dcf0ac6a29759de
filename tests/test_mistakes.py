"""Arguments of the wrong kind: one sentence that says what was expected and what came."""

import io
import json
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
        (lambda: gptfast.train(3), "chosen must be the name of a preset or a Preset, got an int"),
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
        (
            lambda: gptfast.generate(GPT(TINY), ["A"], tokenizer=gptfast.CharTokenizer),
            "tokenizer must be one, .* got the class CharTokenizer",
        ),
        (lambda: gptfast.score("runs/s", [[1]]), "model must be a GPT .* got a str"),
        (lambda: gptfast.pack("runs/s"), "expected a GPT, .* got a str"),
        (lambda: gptfast.pack(gptfast.pack(GPT(TINY))), "the model is packed already"),
        (
            lambda: gptfast.generate(GPT(TINY), [[1]], overflow="stride:" + "9" * 5000),
            "overflow must be",
        ),
        (lambda: gptfast.generate(GPT(TINY), [[1]], temperature=10**400), "temperature must be"),
        (lambda: TrainConfig(lr=10**400), "lr must be .* got a number of 1329 bits"),
        (lambda: TrainConfig(seed=10**5000), "seed must be .* got a number of 16610 bits"),
        (lambda: TrainConfig(betas=(0.9, 10**5000)), "betas must be .* got .0.9, a number of"),
        (lambda: TrainConfig(precision=10**5000), "precision must be one of .* got a number of"),
        (lambda: TrainConfig(recompute=torch.ones(2)), "recompute must be True or False, got ten"),
        (lambda: GPTConfig(dropout=10**5000), "dropout must be in .0, 1., got a number of"),
        (
            lambda: gptfast.save(GPT(TINY), None, "\ud800"),
            "path must be the path of a file or fold",
        ),
        (lambda: TrainConfig(steps=10**400), "steps must be a positive whole number, got a num"),
        (lambda: TrainConfig(warmup_steps=10**400), "warmup_steps must be a whole number"),
        (lambda: gptfast.save(GPT(TINY), None, "a\0b"), "path must be the path of a file or fold"),
        (lambda: gptfast.export(GPT(TINY), None, 5), "path must be the path of a file or folder"),
        (lambda: gptfast.export(GPT(TINY), None, "x", to=["hf"]), "to must be one of"),
        (lambda: gptfast.load("/".join(["a" * 200] * 30)), "a model must be the path .* got 6029"),
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


def test_compiled_models_generate_score_and_pack() -> None:
    model = GPT(TINY).eval()
    compiled: Any = torch.compile(model)
    for given in (compiled, torch.nn.DataParallel(model)):
        assert gptfast.generate(given, [[1]], temperature=0)[0].tokens == (
            gptfast.generate(model, [[1]], temperature=0)[0].tokens
        )
        assert gptfast.score(given, [[1, 2]]) == gptfast.score(model, [[1, 2]])
        assert [*gptfast.stream(gptfast.pack(given), [1], max_new_tokens=2)]


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_a_token_of_probability_zero_is_no_error(backend: Any) -> None:
    model = GPT(replace(TINY, padding_idx=None), backend=backend).eval()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[2] = -3e38  # its logit is -inf
    (result,) = gptfast.generate(model, [[1]], max_new_tokens=5, seed=1)
    assert len(result.tokens) == 5 and 2 not in result.tokens


@pytest.mark.parametrize("backend", ("fused", "reference"))
def test_targets_out_of_range_are_one_sentence(backend: Any) -> None:
    model, idx = GPT(TINY, backend=backend), torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match=r"targets must be in \[0, 5\), got .*7"):
        model.loss(idx, torch.tensor([[1, 7, 2, 3]]))


def test_a_run_does_not_start_from_what_it_replaces(tmp_path: Path) -> None:
    run = trained(out=tmp_path / "run")
    assert run.history and (tmp_path / "run" / "best").is_dir()
    for start in ("run", "run/best"):
        with pytest.raises(ConfigError, match="cannot start from the run that it replaces"):
            trained(out=tmp_path / "run", init_from=tmp_path / start, overwrite=True)
    assert trained(out=tmp_path, init_from=tmp_path / "run").history  # around it, not over it
    assert gptfast.load(tmp_path / "run" / "best")


def test_samples_hold_halves_of_surrogate_pairs(tmp_path: Path) -> None:
    text = ("ABCA" * 10 + "\ud800") * 4
    gptfast.train(RECIPE, tmp_path, text=text, steps=1, sample="\ud800", progress=False)
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"] == "\ud800"


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
    names: Any = {"_base": rows, "b $x_1$": rows, "c\udcff": rows}
    figure = plots._draw(names, "loss", "of \udcff")
    texts = figure.axes[0].get_legend().get_texts()
    assert [each.get_text().strip() for each in texts] == [
        "_base, held-out", "_base, training", "b $x_1$, held-out", "b $x_1$, training",
        "c?, held-out", "c?, training",
    ]  # fmt: skip
    assert figure.axes[0].get_title(loc="left") == "of ?"
    figure.savefig(io.BytesIO())
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
