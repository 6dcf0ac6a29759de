"""Folders of Hugging Face that are damaged or hold something else: a sentence says what it is."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_gpt2
from torch import Tensor

import gptfast
from gptfast import BPETokenizer, CharTokenizer, CheckpointError
from gptfast.formats import huggingface

TOKENIZER = BPETokenizer.train("The cat sat on the mat.\n" * 9, 280)
END = TOKENIZER.ending


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder, with tokenizer."""
    huggingface.write(small_gpt2(), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, message: str) -> None:
    """Asserts that a folder is refused by a sentence that names it."""
    with pytest.raises(CheckpointError, match=message) as caught:
        gptfast.load(folder)
    sentence = str(caught.value)
    assert sentence.startswith(str(folder)) and "\n" not in sentence and "\x1b" not in sentence


def change(file: Path, **values: Any) -> None:
    """Changes entries of a JSON file, or removes those that are given as `...`."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | values
    content = {name: value for name, value in content.items() if value is not ...}
    file.write_text(json.dumps(content))


# ---- config.json


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2' for gptfast, got 'llama'$"),
        ({"model_type": ...}, "model_type must be 'gpt2' for gptfast, got None"),
        (
            {"architectures": ["GPT2DoubleHeadsModel"]},
            "architectures must be GPT2LMHeadModel or GPT2Model for gptfast, got .'GPT2Double",
        ),
        ({"activation_function": "relu"}, "activation_function must be one of gelu_new, .*'relu'$"),
        ({"activation_function": None}, "activation_function must be one of .*, got None"),
        ({"n_inner": 48}, "n_inner must be 4 n_embd = 32 for gptfast, got 48"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05 for gptfast, got 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True for gptfast, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be Fal"),
        ({"add_cross_attention": True}, "add_cross_attention must be False for gptfast, got True"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config must be None for gptfast, got {'quant_method': 'bitsandbytes'}",
        ),
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map must be None for gptfast, got {'Auto"),
        ({"n_head": 3}, "n_embd must be divisible by n_head, got n_embd=8 and n_head=3"),
        ({"n_layer": "2"}, "n_layer must be a positive whole number, got '2'"),
        ({"n_embd": None}, "n_embd must be a positive whole number, got None"),
        ({"vocab_size": None}, "vocab_size must be a positive whole number, got None"),
        ({"tie_word_embeddings": "yes"}, "tie_weights must be True or False, got 'yes'"),
        ({"resid_pdrop": 1, "embd_pdrop": 1, "attn_pdrop": 1}, r"dropout must be in \[0, 1\), got"),
        ({"vocab_size": 290}, r"wte.weight has shape \(300, 8\), expected \(290, 8\)"),
        ({"vocab_size": 260}, "the tokenizer has 2.. ids, more than the model's vocab_size 260"),
        ({"n_layer": 3}, "does not fit its configuration: it lacks h.2.attn.c_attn.bias and 11 m"),
        ({"n_layer": 10**9}, "does not fit its configuration: it lacks h.10.attn"),
        ({"n_layer": 1}, "it has unexpected h.1.attn.c_attn.bias and 11 more"),
        ({"n_positions": 10**30}, r"block_size must be a positive"),
        ({"n_positions": 10**15}, r"wpe.weight has shape|damaged or unreadable"),
        ({"tie_word_embeddings": False}, "it lacks lm_head.weight"),
    ],
)
def test_other_configurations(values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder / "config.json", **values)
    refused(folder, message)


def test_other_names_of_sizes_and_defaults(folder: Path) -> None:
    names = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings"}
    names |= {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    content = json.loads((folder / "config.json").read_text())
    plain, _ = gptfast.load(folder)
    renamed = {new: content[old] for old, new in names.items()}
    change(folder / "config.json", **dict.fromkeys(names, ...), **renamed)
    assert gptfast.load(folder)[0].config == plain.config
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    gpt2 = huggingface.read_config(folder)
    assert (gpt2.vocab_size, gpt2.block_size, gpt2.n_embd, gpt2.n_layer) == (50257, 1024, 768, 12)
    assert (gpt2.n_head, gpt2.gelu, gpt2.tie_weights, gpt2.dropout) == (12, "tanh", True, 0.1)


# ---- damaged files

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HTML = b"<!DOCTYPE html><html>Sign in</html>"
BROKEN = {
    LFS: "a pointer of Git LFS: git lfs pull",
    HTML: "it is a page of HTML",
    b"": "",
    b"\0": "",
}
FILES = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"]
FILES += ["tokenizer_config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, content: bytes, folder: Path) -> None:
    if name != "model.safetensors" and not (folder / name).exists():
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    if name == "tokenizer.json":
        refused(folder, "its tokenizer cannot be read|damaged or unreadable")
    else:
        refused(folder, f"{name}: the file is damaged or unreadable .*{BROKEN[content]}")


def test_half_a_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(folder, "model.safetensors: the file is damaged or unreadable")
    file.unlink()
    refused(folder, "model: no weights, expected model.safetensors or pytorch_model.bin$")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json: expected a JSON object, got a list")


class Runs:
    """What would write a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("new", [True, False])
def test_nothing_runs_that_a_file_holds(new: bool, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = {"wte.weight": Runs(tmp_path / "ran")}
    file = folder / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=new)
    refused(folder, "pytorch_model.bin: .* .it is no file of torch.save, or holds more than")
    assert not (tmp_path / "ran").exists()


# ---- weights


def weights(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the weights, and keeps them in a pytorch_model.bin."""
    from safetensors.torch import load_file

    tensors: Any = load_file(folder / "model.safetensors")
    changed = edit(tensors)
    (folder / "model.safetensors").unlink()
    torch.save(tensors if changed is None else changed, folder / "pytorch_model.bin")


WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"


def replace_head(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors[WTE].clone()
    tensors["lm_head.weight"][3, 3] += 1e-3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(FC) is None, "it lacks h.0.mlp.c_fc.weight$"),
        (lambda t: t.update(more=torch.ones(1)), "it has unexpected more$"),
        (
            lambda t: t.update({FC: t[FC].t()}),
            r"h.0.mlp.c_fc.weight has shape \(32, 8\), expected \(8, 32\)",
        ),
        (lambda t: t.update({FC: t[FC].to(torch.int8)}), "c_fc.weight is a Tensor of int8 on cpu"),
        (lambda t: t.update({FC: t[FC].to_sparse()}), "expected a dense floating-point tensor"),
        (lambda t: t.update({FC: 3}), "h.0.mlp.c_fc.weight is a int, expected a tensor"),
        (lambda t: t.update({"wte.weight": t[WTE]}), "it has wte.weight twice, with a prefix and"),
        (replace_head, "tie_word_embeddings is true, but lm_head.weight is not wte.weight"),
        (
            lambda t: t.update({"lm_head.weight": t[WTE].double()}),
            "tie_word_embeddings is true, but lm_head.weight is not wte.weight",
        ),
        (lambda t: [1, 2], "expected weights by name, got a list"),
    ],
)
def test_other_weights(edit: Any, message: str, folder: Path) -> None:
    # The first edit returns False, which is no content.
    weights(folder, lambda tensors: edit(tensors) or None)
    refused(folder, message)


def test_weights_may_be_parameters(folder: Path) -> None:
    plain, _ = gptfast.load(folder)
    weights(folder, lambda tensors: {n: torch.nn.Parameter(t) for n, t in tensors.items()})
    model, _ = gptfast.load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_a_tied_head_may_be_there(folder: Path) -> None:
    plain, _ = gptfast.load(folder)
    weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[WTE]}))
    model, _ = gptfast.load(folder)
    assert model.lm_head.weight is model.wte.weight
    assert torch.equal(model.wte.weight, plain.wte.weight)


def shard(folder: Path, places: Any, parts: dict[str, dict[str, Tensor]]) -> None:
    for name, tensors in parts.items():
        torch.save(tensors, folder / name)
    (folder / "model.safetensors").unlink()
    change(folder / "pytorch_model.bin.index.json", weight_map=places)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({}, "index.json: lists no files with weights .weight_map.$"),
        (None, "index.json: lists no files with weights"),
        ({"a": "../a.bin"}, "index.json: names no file that may be beside it, '../a.bin'"),
        ({"a": "/a.bin"}, "index.json: names no file that may be beside it, '/a.bin'"),
        ({"a": ".."}, "index.json: names no file that may be beside it, '..'"),
        ({"a": 3}, "index.json: names no file that may be beside it, 3"),
        ({"a": ["a"]}, r"index.json: names no file that may be beside it, \['a'\]"),
        ({"a": "a.bin", "b": "c.bin"}, "c.bin: the file is damaged or unreadable .*No such file"),
        ({"a": "a.bin", "b": "b.bin"}, "b.bin: wte.weight is in another file of the model as well"),
    ],
)
def test_wrong_shards(places: Any, message: str, folder: Path) -> None:
    tensors = {"wte.weight": torch.ones(300, 8)}
    shard(folder, places, {"a.bin": tensors, "b.bin": tensors})
    refused(folder, message)


# ---- tokenizers


def pair(folder: Path) -> None:
    """Replaces the tokenizer by GPT-2's two files."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines))


def tokenizer_of(folder: Path) -> BPETokenizer:
    found = gptfast.load(folder)[1]
    assert isinstance(found, BPETokenizer)
    return found


def test_a_tokenizer_in_two_files_or_none(folder: Path) -> None:
    assert tokenizer_of(folder) == TOKENIZER
    pair(folder)
    found = tokenizer_of(folder)
    assert (found.pieces, found.end_of_text) == (TOKENIZER.pieces, TOKENIZER.end_of_text)
    assert found.encode("The cat") == TOKENIZER.encode("The cat")
    (folder / "merges.txt").unlink()
    refused(folder, "its tokenizer cannot be read: .*no tokenizer, it has no tokenizer.json or")
    (folder / "vocab.json").unlink()
    assert gptfast.load(folder)[1] is None


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    model, tokenizer = gptfast.load(folder)
    (found,) = gptfast.generate(model, [[1]], tokenizer=tokenizer, max_new_tokens=3)
    assert found.text is not None


SETTINGS = "tokenizer_config.json", "special_tokens_map.json", "config.json"


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ([{"eos_token": "<|end|>"}, {"eos_token": "</s>"}, {"eos_token_id": 0}], "<|end|>"),
        ([{"eos_token": {"content": "<|end|>"}}, {}, {}], "<|end|>"),
        ([{"eos_token": None}, {"eos_token": "<|end|>"}, {"eos_token_id": 0}], "<|end|>"),
        ([{}, {"eos_token": {"content": "<|end|>"}}, {}], "<|end|>"),
        ([{}, {}, {"eos_token_id": 281}], "<|end|>"),
        ([{}, {}, {"eos_token_id": [5, 281]}], "<|end|>"),
        ([{}, {}, {"eos_token_id": 5}], END),  # an ordinary token, as GPT-2's id in other models
        ([{}, {}, {"eos_token_id": ...}], END),
        ([{}, {}, {"eos_token_id": None}], END),
        ([{"eos_token": "a"}, {}, {}], "a"),  # is made a special token
        ([{"eos_token": "<|more|>"}, {}, {}], "<|more|>"),  # as well
    ],
)
def test_the_end_of_a_text(settings: list[Any], ending: str, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, token in ((280, "<|more|>"), (281, "<|end|>")):
        added = {"id": i, "content": token, "special": token == "<|end|>", **plain}
        content["added_tokens"].append(added)
    change(folder / "tokenizer.json", **content)
    change(folder / "tokenizer_config.json", eos_token=...)
    for name, values in zip(SETTINGS, settings, strict=True):
        change(folder / name, **values)
    found = tokenizer_of(folder)
    assert found.ending == ending
    assert found.pieces[found.end_of_text or 0] == b""
    ids = {"a": content["model"]["vocab"]["a"], "<|end|>": 281, "<|more|>": 280, END: 0}
    assert found.end_of_text == ids[ending]


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, "cat"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, " cat"),
        ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False}, "cat"),
        ({"tokenizer_class": ..., "add_prefix_space": True}, " cat"),
    ],
)
def test_a_space_before_a_text(settings: dict[str, Any], ids: str, folder: Path) -> None:
    change(folder / "tokenizer_config.json", **settings)
    assert tokenizer_of(folder).encode("cat") == TOKENIZER.encode(ids)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": {}}}, "got one of the kind 'Unigram'"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "expected a byte-level tokenizer"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "expected byte-pair encoding, or ch"),
        ({"model": None}, "tokenizer.json: the file is damaged or unreadable"),
        (
            {"model": {"type": "WordLevel"}},
            "tokenizer.json: the file is damaged .*no entry 'vocab'",
        ),
    ],
)
def test_other_tokenizers(parts: dict[str, Any], message: str, folder: Path) -> None:
    change(folder / "tokenizer.json", **parts)
    refused(folder, message)


def test_an_end_that_is_no_token(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="</s>")
    refused(
        folder, "its tokenizer cannot be read: '</s>', which ends a text .eos_token., has no id"
    )


def test_characters(tmp_path: Path) -> None:
    folder, known = tmp_path / "model", CharTokenizer.from_text("ab\n ß")
    huggingface.write(small_gpt2(), known, folder)
    assert gptfast.load(folder)[1] == known
    content = json.loads((folder / "tokenizer.json").read_text())
    for vocabulary in ({"<PAD>": 0, "ab": 1}, {"<PAD>": 0, "a": 2}, {"a": 0, "b": 2}):
        model = content["model"] | {"vocab": vocabulary}
        change(folder / "tokenizer.json", model=model)
        refused(folder, "expected byte-pair encoding, or characters as gptfast writes them, got")


def test_sentences_name_the_file(folder: Path) -> None:
    change(folder / "config.json", n_head=3)
    refused(folder, f"^{re.escape(str(folder / 'config.json'))}: n_embd must be")


def test_tokens_that_were_added_to_gpt2s_two_files(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    vocabulary = content["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    pairs = content["model"]["merges"]
    lines = [each if isinstance(each, str) else " ".join(each) for each in pairs]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    added = max(vocabulary.values()) + 1
    (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": added}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|user|>"}))
    _, tokenizer = gptfast.load(folder)
    assert tokenizer is not None and tokenizer.end_of_text == added
    assert tokenizer.decode([added]) == ""
