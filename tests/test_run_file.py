"""Options of a run from a TOML file: what wins, what is refused, and that it gives a run again."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import QUESTION
from small_models import assert_same_weights

import gptfast
from gptfast import checkpoint, cli
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import ConfigError
from gptfast.presets import preset
from gptfast.run_file import RUN_FILE_NAME, read_run_file, to_toml
from gptfast.tokenizer import CharTokenizer

SMALL = """
[model]
n_embd = 16
n_layer = 1

[train]
steps = 3
batch_size = 2
eval_every = "None"
"""


def written(tmp_path: Path, content: str, name: str = "options.toml") -> Path:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def train(*arguments: object) -> int:
    return cli.main(["train", *map(str, arguments)])


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path, text_file):
    file = written(tmp_path, f"[run]\ndata = {str(text_file)!r}\n{SMALL}")
    assert train("abc", "--config", file, "--out", tmp_path / "run", "--train.steps=4") == 0
    header = checkpoint.read_config(tmp_path / "run")
    assert (header["config"]["n_embd"], header["config"]["block_size"]) == (16, 16)
    found = header["extra"]["train"]
    assert (found["steps"], found["batch_size"]) == (4, 2)
    assert (found["lr"], found["eval_every"]) == (3e-3, None)
    assert header["extra"]["data"] == str(text_file)


def test_a_file_may_hold_all_that_a_run_needs(tmp_path, text_file):
    out = tmp_path / "run"
    lines = [f"out = {str(out)!r}", f"data = {str(text_file)!r}", 'preset = "abc"', "threads = 1"]
    file = written(tmp_path, "\n".join(["[run]", *lines, SMALL]))
    assert train("--config", file) == 0
    assert checkpoint.read_config(out)["extra"]["step"] == 3


def test_the_model_that_a_file_starts_from_gives_the_shape(tmp_path, text_file):
    small = written(tmp_path, SMALL)
    assert train("abc", "--config", small, "--data", text_file, "--out", tmp_path / "a") == 0
    lines = f"[run]\ninit_from = {str(tmp_path / 'a')!r}\n[train]\nsteps = 1\n[model]\ndropout = 0"
    file = written(tmp_path, lines, "second.toml")
    assert train("abc", "--config", file, "--data", text_file, "--out", tmp_path / "b") == 0
    config = checkpoint.read_config(tmp_path / "b")["config"]
    assert (config["n_embd"], config["dropout"]) == (16, 0.0)


def test_the_file_of_a_run_gives_it_again(tmp_path, text_file):
    first, second = tmp_path / "first", tmp_path / "second"
    file = written(tmp_path, SMALL)
    options = ["--data", text_file, "--train.betas", "0.5", "0.75", "--train.steps=2"]
    assert train("abc", "--config", file, *options, "--model.dropout=0.5", "--out", first) == 0
    assert train("--config", first / RUN_FILE_NAME, "--out", second) == 0
    assert (first / RUN_FILE_NAME).read_text() == (second / RUN_FILE_NAME).read_text()
    assert_same_weights(*(checkpoint.load(path)[0] for path in (first, second)))
    assert train("--config", first / RUN_FILE_NAME, "--out", first, "--overwrite") == 0
    # What resumes with other options notes them.
    assert train("abc", "--config", first / RUN_FILE_NAME, "--out", first, "--resume") == 0
    options = ["--config", first / RUN_FILE_NAME, "--out", first, "--resume", "--train.steps=3"]
    assert train(*options) == 0
    assert read_run_file(first / RUN_FILE_NAME)["train"]["steps"] == 3


def test_a_text_that_only_python_has_is_not_replaced_by_the_presets(capsys, tmp_path, text_file):
    options = {"steps": 1, "n_embd": 8, "n_layer": 1, "progress": False}
    tokenizer = CharTokenizer.from_text(QUESTION + "é")
    gptfast.train("abc", tmp_path / "a", text=QUESTION, **options)
    gptfast.train("abc", tmp_path / "b", data=text_file, tokenizer=tokenizer, **options)
    custom = replace(preset("abc"), text=lambda: QUESTION)
    gptfast.train(custom, tmp_path / "c", **options)
    for name in "abc":
        file = tmp_path / name / RUN_FILE_NAME
        assert read_run_file(file)["run"] == {"backend": "auto", "device": "cpu"}
        assert train("--config", file, "--out", tmp_path / "other") == 2
        assert "the preset comes first" in capsys.readouterr().err
    gptfast.train("abc", tmp_path / "d", data=text_file, init_from=tmp_path / "a", **options)
    found = read_run_file(tmp_path / "d" / RUN_FILE_NAME)["run"]
    assert found["init_from"] == str(tmp_path / "a") and found["data"] == str(text_file)


def test_help_shows_the_defaults_of_the_file(capsys, tmp_path):
    assert train("abc", "--config", written(tmp_path, SMALL), "--help") == 0
    assert "C (default: 16)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lr = ", r"options\.toml: not a TOML file \(Invalid value"),
        ("lr = 0.1", r"options\.toml: lr must stand below \[run\], \[model\] or \[train\]"),
        ("[optimizer]\nlr = 0.1", r"no table \[optimizer\]; there are run, model, train"),
        ("[train]\nlearning_rate = 0.1", r"\[train\]: there is no option 'learning_rate'.* lr, "),
        ("[train]\nlr = -1", r"options\.toml, \[train\]: lr must be a number above 0, got -1"),
        ('[train]\nlr = "None"', r"\[train\]: lr must be a number above 0, got None"),
        ("[model]\nn_head = 3", r"\[model\]: n_embd must be divisible by n_head"),
        ('[run]\nthreads = "two"', r"threads must be a whole number or \"None\", got 'two'"),
        ("[run]\nthreads = true", r"threads must be a whole number or \"None\", got True"),
        ('[run]\nbackend = "fast"', r"\[run\]: backend must be one of 'auto', .* got 'fast'"),
        ("[run]\ndata = 5", r"\[run\]: data must be a text or \"None\", got 5"),
        ("[run]\noverwrite = true", r"\[run\]: there is no option 'overwrite'; there are preset, "),
        ("[run]\npreset = 5", r"\[run\]: preset must be a name, got 5"),
        ("", r"the preset comes first: gptfast train PRESET --config"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(capsys, tmp_path, content, expected):
    preset = ["abc"] if content and "preset" not in content else []
    out = tmp_path / "run"
    assert train(*preset, "--config", written(tmp_path, content), "--out", out) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out.exists()
    assert re.search(expected, err), err


def test_a_file_that_cannot_be_read(capsys, tmp_path):
    assert train("abc", "--config", tmp_path / "none.toml", "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err == f"gptfast: {tmp_path / 'none.toml'}: no such file\n"
    (tmp_path / "latin").write_bytes(b'[run]\ndata = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin: not a TOML file \('utf-8' codec"):
        read_run_file(tmp_path / "latin")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run_file(tmp_path)


def test_what_is_written_is_read_again(tmp_path):
    text = 'a "quoted" \\ line\n\ttab \x7f \x00 é 😀 \u2028'
    values = {"sample": text, "lr": 1e-05, "steps": None, "betas": (0.9, 0.99), "recompute": True}
    tables = {"run": {"data": "C:\\text"}, "model": {"n_layer": 2}, "train": values}
    content = to_toml(tables)
    assert tomllib.loads(content)["train"]["betas"] == [0.9, 0.99]
    path = written(tmp_path, content)
    tables["train"]["betas"] = [0.9, 0.99]
    assert read_run_file(path) == tables


def test_every_option_survives_the_file(tmp_path):
    model = GPTConfig(vocab_size=7, bias=False, padding_idx=None, gelu="tanh")
    train = TrainConfig(clip=0.3, steps=5, betas=(0.5, 0.25), weight_decay=1 / 3)
    tables = {"run": {}, "model": model.to_dict(), "train": vars(train)}
    read = read_run_file(written(tmp_path, to_toml(tables)))
    assert GPTConfig(**read["model"]) == model
    assert TrainConfig(**read["train"]) == train
