"""Models for other projects: `gptfast.export` and `gptfast export`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from nano import NanoGPT

import gptfast
from gptfast import GPT, CharTokenizer, CheckpointError, ConfigError, GPTConfig, cli
from gptfast.formats import nanogpt

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = CharTokenizer.from_text("to be, or not to be\n")
CONFIG = GPTConfig(
    block_size=8, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_embd=16, tie_weights=True
)


@pytest.fixture
def model() -> GPT:
    return GPT(CONFIG, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_path(model: GPT, tmp_path: Path) -> Path:
    """A checkpoint whose folder has a best/ with other weights."""
    best = GPT(CONFIG, generator=torch.Generator().manual_seed(2))
    gptfast.save(model, TOKENIZER, tmp_path / "runs" / "be")
    gptfast.save(best, TOKENIZER, tmp_path / "runs" / "be" / "best")
    return tmp_path / "runs" / "be"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_wrapped_model_is_exported(model, tmp_path):
    wrapped = torch.nn.DataParallel(model)
    gptfast.export(wrapped, TOKENIZER, tmp_path / "new" / "out", to="nanogpt")
    again, tokenizer = nanogpt.read(tmp_path / "new" / "out")
    assert torch.equal(again.wte.weight, model.wte.weight) and tokenizer == TOKENIZER


@pytest.mark.filterwarnings("ignore:llama.cpp")
@pytest.mark.parametrize(("path", "file"), [("out", "out/model.gguf"), ("a/b.gguf", "a/b.gguf")])
def test_gguf_goes_to_a_folder_or_a_file(model, tmp_path, path, file):
    pytest.importorskip("gguf", reason="GGUF is written by the package gguf")
    gptfast.export(model, TOKENIZER, tmp_path / path, to="gguf")
    assert [Path(name) for name in files(tmp_path)] == [tmp_path / file]
    with pytest.raises(ConfigError, match="say overwrite"):
        gptfast.export(model, TOKENIZER, tmp_path / path, to="gguf")
    gptfast.export(model, TOKENIZER, tmp_path / path, to="gguf", overwrite=True)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ConfigError, match="folder.gguf: expected a file, got a folder"):
        gptfast.export(model, TOKENIZER, tmp_path / "folder.gguf", to="gguf")


def test_warnings_name_the_line_that_exports(model, tmp_path):
    with pytest.warns(UserWarning, match="GPT-2's tokens") as caught:
        gptfast.export(model, None, tmp_path / "out", to="nanogpt")
    assert [each.filename for each in caught] == [__file__]


def test_what_is_there_stays(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: choose another folder, or say overwrite"):
        gptfast.export(model, TOKENIZER, tmp_path, to="nanogpt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    gptfast.export(model, TOKENIZER, tmp_path, to="nanogpt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="notes.txt: expected a folder, got a file"):
        gptfast.export(model, TOKENIZER, tmp_path / "notes.txt", to="nanogpt", overwrite=True)


@pytest.mark.parametrize("to", ["hf", "nanogpt", "gguf"])
def test_a_run_is_not_overwritten(model, run_path, to):
    before = files(run_path)
    for path in (run_path, run_path / "best"):
        with pytest.raises(ConfigError, match="holds a checkpoint of gptfast: choose another"):
            gptfast.export(model, TOKENIZER, path, to=to, overwrite=True)
    assert files(run_path) == before


class Lower(CharTokenizer):
    """A tokenizer of a user's own."""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "onnx"}, ConfigError, "to must be one of hf, gguf, nanogpt, got 'onnx'"),
        ({"model": torch.nn.Linear(1, 1)}, ConfigError, "expected a GPT"),
        ({"tokenizer": Lower(("a",))}, ConfigError, "a tokenizer of type Lower cannot be stored"),
        ({"tokenizer": CharTokenizer.from_text("a to z, 0123456789")}, CheckpointError, "more th"),
    ],
)
def test_what_cannot_be_exported_is_said(model, tmp_path, arguments, error, message):
    given: dict[str, Any] = {"model": model, "tokenizer": TOKENIZER, "to": "nanogpt"} | arguments
    with pytest.raises(error, match=message):
        gptfast.export(path=tmp_path / "out", **given)
    assert not files(tmp_path)


def test_a_model_that_was_changed_is_not_exported(model, tmp_path):
    model.ln_f.eps = 1e-3
    with pytest.raises(CheckpointError, match="ln_f has eps=0.001, expected 1e-05"):
        gptfast.export(model, TOKENIZER, tmp_path / "out", to="nanogpt")
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/out: the model could not be exported"):
        gptfast.export(model, TOKENIZER, tmp_path / "file" / "out", to="nanogpt")


@pytest.mark.parametrize("part", ["", "best"])
def test_the_command_says_how_nanogpt_loads_it(capsys, run_path, tmp_path, part):
    out = tmp_path / "to be"  # needs quotes
    assert cli.main(["export", str(run_path / part), str(out), "--to", "nanogpt"]) == 0
    printed, err = capsys.readouterr()
    assert err == "" and f"written  {out}\n" in printed
    content = torch.load(out / "ckpt.pt", weights_only=True)
    NanoGPT(**content["model_args"]).load_state_dict(content["model"])
    model, tokenizer = gptfast.load(run_path / part)
    assert torch.equal(content["model"]["lm_head.weight"], model.lm_head.weight)
    [line] = re.findall(r"load it  (.*) && python sample.py --out_dir='(.*)'  \(in nano", printed)
    nano = tmp_path / "nanoGPT"
    nano.mkdir()
    subprocess.run(line[0], shell=True, cwd=nano, check=True)
    assert (nano / "data" / content["config"]["dataset"] / "meta.pkl").is_file()
    assert line[1] == str(out) and nanogpt.read(out)[1] == tokenizer


def test_the_command_prints_warnings(run_path, tmp_path):
    pytest.importorskip("gguf", reason="GGUF is written by the package gguf")
    out = tmp_path / "be.gguf"
    command = [sys.executable, "-m", "gptfast", "export", run_path, out, "--to", "gguf"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert f"llama-cli -m {out} " in done.stdout and out.is_file()
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: llama.cpp ") for line in lines)


def test_mistakes_of_the_command_are_one_sentence(capsys, run_path, tmp_path):
    out = tmp_path / "out"
    error = refused(capsys, "export", tmp_path / "none", out, "--to", "nanogpt")
    assert "none: no such checkpoint" in error
    assert "--to" in refused(capsys, "export", run_path, out)
    assert "onnx" in refused(capsys, "export", run_path, out, "--to", "onnx")
    (out / "x").mkdir(parents=True)
    assert "is not empty" in refused(capsys, "export", run_path, out, "--to", "nanogpt")
    shutil.rmtree(out)
    gptfast.save(GPT(GPTConfig(vocab_size=5, n_embd=8, tie_weights=False)), None, tmp_path / "own")
    error = refused(capsys, "export", tmp_path / "own", out, "--to", "nanogpt")
    assert "nanoGPT has no models with a head of its own" in error
    assert not out.exists()
