"""Whose format a model has, and every place that takes a model's path."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import small_gpt2

import gptfast
from gptfast import (
    BPETokenizer,
    CheckpointError,
    ConfigError,
    DataError,
    checkpoint,
    cli,
    formats,
)
from gptfast.data.token_files import open_tokens
from gptfast.formats import huggingface
from gptfast.training import held_out

TEXT = "The cat sat on the mat.\n" * 40
TOKENIZER = BPETokenizer.train(TEXT, 280)
QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "progress": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Hugging Face."""
    huggingface.write(small_gpt2(), TOKENIZER, tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def main(*arguments: Any) -> int:
    return cli.main([*map(str, arguments)])


# ---- whose format it is


def test_own_checkpoints_are_told_by_either_file(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    gptfast.save(small_gpt2(), None, own)
    assert formats.format_of(own) == "gptfast" and formats.format_of(folder) == "huggingface"
    assert gptfast.load(own)[0].config == small_gpt2().config == formats.config_of(own)
    assert formats.tokenizer_of(own) is None and formats.stored_with(folder) is None
    for name in ("config.json", "model.safetensors"):
        copy = shutil.copytree(own, tmp_path / name)
        (copy / name).write_bytes(b"{")
        with pytest.raises(CheckpointError, match=f"{name}/{name}: the file is damaged"):
            gptfast.load(copy)
    (own / "config.json").unlink()
    assert formats.format_of(own) == "gptfast"
    (own / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="not the configuration that model.safetensors was"):
        gptfast.load(own)


def test_a_run_is_read_as_before(tmp_path: Path) -> None:
    gptfast.train("abc", tmp_path / "run", text=TEXT, n_layer=1, n_embd=8, **QUICK)
    model, tokenizer = gptfast.load(tmp_path / "run")
    own, known = checkpoint.load(tmp_path / "run")
    assert (model.config, tokenizer) == (own.config, known)


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    named = "neither config.json of Hugging Face nor ckpt.pt of nanoGPT"
    cases: list[tuple[Any, str]] = [
        (lambda: None, f"place: not a checkpoint, it has no model.safetensors, and {named}$"),
        (
            lambda: save_file({"a": torch.ones(1)}, place / "model.safetensors"),
            "model.safetensors: not a gptfast checkpoint .its metadata name another format., and no"
            " config.json beside it says what it is$",
        ),
        (
            lambda: (place / "model.safetensors").write_bytes(b"\0" * 20),
            "model.safetensors: the file is damaged or unreadable",
        ),
    ]
    for prepare, message in cases:
        prepare()
        with pytest.raises(CheckpointError, match=message):
            gptfast.load(place)
    files = {
        folder / "model.safetensors": "expected ckpt.pt of nanoGPT, or weights with the course's",
        folder / "config.json": "config.json: the file is damaged or unreadable",
        tmp_path / "list.pt": "list.pt: expected ckpt.pt of nanoGPT, or weights with the course's",
        tmp_path / "none": "none: no such checkpoint$",
    }
    torch.save([1, 2], tmp_path / "list.pt")
    for file, message in files.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            gptfast.load(file)
        assert "\n" not in str(caught.value)


def test_n_head_is_for_the_courses_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpt2: n_head is for the course's weights alone, got 2"):
        gptfast.load(folder, n_head=2)
    for name in ("a.safetensors", "a.pt"):
        names = ("wte.weight", "wpe.weight", "scale3.weight", "ln_f.weight")
        content = {each: torch.ones(2, 2) for each in names}
        keep: Any = save_file if name.endswith("s") else torch.save
        keep(content, tmp_path / name)
        assert formats.format_of(tmp_path / name) == "course"
        with pytest.raises(ConfigError, match="do not tell how many heads there are: gptfast.load"):
            gptfast.load(tmp_path / name)


def test_nanogpts_file_alone_or_in_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    torch.save({"model": {}, "model_args": {"n_layer": 1}, "config": {}}, file)
    assert formats.format_of(file) == formats.format_of(tmp_path) == "nanogpt"


def test_the_callers_random_stream_is_left_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    gptfast.load(folder)
    assert torch.equal(torch.rand(2), expected)


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device 'meta' keeps no numbers"):
        gptfast.load(folder, "meta")


# ---- the commands


def test_generate_eval_and_inspect(folder: Path, text: Path, capsys: Any) -> None:
    (found,) = gptfast.generate(
        small_gpt2(), ["The cat"], tokenizer=TOKENIZER, max_new_tokens=5, temperature=0
    )
    options = ["--prompt", "The cat", "--max-new-tokens", "5", "--temperature", "0"]
    assert main("generate", folder, *options) == 0
    assert capsys.readouterr().out == f"The cat{found.text}\n"
    assert main("eval", folder, "--data", text) == 0
    assert f"characters  {len(TEXT) - len(TOKENIZER.decode(TOKENIZER.encode(TEXT)[:1]))}" in (
        capsys.readouterr().out.replace(",", "")
    )
    assert main("inspect", folder, "--attention", "The cat") == 0
    out = capsys.readouterr().out
    assert "BPETokenizer(vocab_size=" in out and "attn_proj_dropout: True" in out
    assert "extra" not in out and "layer 1, head 1: tenths of the attention" in out


def test_eval_needs_a_text(folder: Path, capsys: Any) -> None:
    message = "gpt2: it is not known on which text this model was trained: give one"
    with pytest.raises(DataError, match=message):
        held_out(folder)
    assert main("eval", folder) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_tokenizer(tmp_path: Path, text: Path, capsys: Any) -> None:
    huggingface.write(small_gpt2(), None, tmp_path / "bare")
    assert main("generate", tmp_path / "bare", "--prompt", "A") == 2
    assert "bare: the model has no tokenizer, so it cannot take text" in capsys.readouterr().err
    options = ["--out", tmp_path / "tokens", "--tokenizer", tmp_path / "bare"]
    assert main("data", "prepare", text, *options) == 2
    assert "bare: the model has no tokenizer" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="bare: the model has no tokenizer: give the one of its"):
        gptfast.train("abc", text=TEXT, init_from=tmp_path / "bare", **QUICK)
    options = {"tokenizer": TOKENIZER, "text": TEXT, "init_from": tmp_path / "bare"}
    assert gptfast.train("abc", **options, **QUICK).tokenizer == TOKENIZER


@pytest.mark.parametrize("kind", ["huggingface", "own", "file", "tokenizer alone", "tokens"])
def test_data_prepare_takes_a_models_tokenizer(
    kind: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    source = folder
    if kind == "own":
        source = tmp_path / "own"
        gptfast.save(small_gpt2(), TOKENIZER, source)
    elif kind == "file":
        source = folder / "tokenizer.json"
    elif kind == "tokenizer alone":
        source = tmp_path / "alone"
        source.mkdir()
        shutil.copy(folder / "tokenizer.json", source)
    elif kind == "tokens":
        source = tmp_path / "before"
        assert main("data", "prepare", text, "--out", source, "--tokenizer", folder) == 0
    assert main("data", "prepare", text, "--out", tmp_path / "tokens", "--tokenizer", source) == 0
    found = open_tokens(tmp_path / "tokens")
    assert found.tokenizer == TOKENIZER
    assert found.ids.tolist() == [*TOKENIZER.encode(TEXT), TOKENIZER.end_of_text]


# ---- training from it


def test_a_finetuned_model_is_an_ordinary_run(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--data", text, "--train.batch-size", 2, "--threads", 1, "--train.val-fraction", 0.1]
    start = ["--init-from", folder, "--train.lr", 1e-9, "--train.weight-decay", 0]
    assert main("train", "abc", "--out", out, *options, *start, "--train.steps", 2) == 0
    model, tokenizer = gptfast.load(out)
    assert tokenizer == TOKENIZER and formats.format_of(out) == "gptfast"
    assert model.config == formats.config_of(folder)
    for own, given in zip(model.parameters(), small_gpt2().parameters(), strict=True):
        torch.testing.assert_close(own, given, rtol=0, atol=1e-7)
    header = checkpoint.read_config(out)
    assert header["extra"]["init_from"] == str(folder) and header["extra"]["step"] == 2
    assert main("train", "--config", out / "run.toml", "--out", tmp_path / "again") == 0
    again, _ = gptfast.load(tmp_path / "again")
    for own, given in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, given)
    shutil.rmtree(folder)
    resumed = ["--resume", "--train.steps", 4, "--train.lr", 1e-9, "--train.weight-decay", 0]
    assert main("train", "abc", "--out", out, *options, *resumed) == 0
    assert checkpoint.read_config(out)["extra"]["step"] == 4
    assert main("eval", out) == 0


def test_the_shape_is_the_models(folder: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--out", tmp_path / "run", "--data", text, "--init-from", folder]
    assert main("train", "abc", *options, "--model.n-layer", 3) == 2
    sentence = "gpt2: the model has n_layer=2 and a run from it cannot have n_layer=3"
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    options += ["--train.steps", 1, "--train.batch-size", 2]
    assert main("train", "abc", *options, "--model.dropout", 0.4) == 0
    assert gptfast.load(tmp_path / "run")[0].config.dropout == 0.4
    assert main("train", "abc", "--out", tmp_path / "b", "--data", text, "--init-from", "none") == 2
    assert "none: no such checkpoint" in capsys.readouterr().err


def test_weights_of_16_bits_are_trained_in_32(tmp_path: Path) -> None:
    huggingface.write(small_gpt2().half(), TOKENIZER, tmp_path / "half")
    result = gptfast.train("abc", text=TEXT, init_from=tmp_path / "half", **QUICK)
    assert {weight.dtype for weight in result.model.parameters()} == {torch.float32}
    assert gptfast.load(tmp_path / "half")[0].wte.weight.dtype == torch.float16


def test_dropouts_that_differ_are_told_and_may_be_given(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_pdrop": 0.0}))
    with pytest.warns(UserWarning, match="it is loaded with dropout=0, which only training would"):
        result = gptfast.train("abc", text=TEXT, init_from=folder, dropout=0.2, **QUICK)
    assert result.model.config.dropout == 0.2
