"""nanoGPT's checkpoints, read and written, beside a model with its names and arithmetic."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nano import NanoGPT

import gptfast
from gptfast import (
    GPT,
    BPETokenizer,
    CharTokenizer,
    CheckpointError,
    GPTConfig,
    GptfastError,
    generate,
)
from gptfast.bpe_files import BYTE_SYMBOLS, END_OF_TEXT
from gptfast.formats import nanogpt

TEXT = "to be, or not to be\n"
CHARS = tuple(sorted(set(TEXT)))
ARGS: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": True,
    "vocab_size": len(CHARS), "dropout": 0.1,
}  # fmt: skip
OWN = GPTConfig(
    block_size=16, vocab_size=len(CHARS) + 1, n_embd=32, dropout=0.0, tie_weights=True, init="gpt2"
)
# Logits are about 3 in float32; sums in another order change their last bits (by 2e-6 so far).
BUDGET = 1e-5


def meta(chars: tuple[str, ...] = CHARS) -> dict[str, Any]:
    """What nanoGPT's preparation of characters writes."""
    return {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {char: i for i, char in enumerate(chars)},
    }


def nano(**args: Any) -> tuple[NanoGPT, dict[str, Any]]:
    """A model of nanoGPT's and the checkpoint that its train.py saves of it."""
    torch.manual_seed(1)
    model_args = ARGS | args
    model = NanoGPT(**model_args).eval()
    optimizer = model.optimizer()
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    config = {"dataset": "hamlet", "batch_size": 64, "dtype": "float16", "compile": True}
    return model, {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": config,
    }


def saved(folder: Path, content: Any, meta: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "ckpt.pt")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def own(**fields: Any) -> GPT:
    torch.manual_seed(2)
    model = GPT(replace(OWN, **fields)).eval()
    for name, param in model.named_parameters():  # biases and norms that matter
        if param.dim() < 2:
            torch.nn.init.normal_(param, mean=float(name.endswith("weight")), std=0.2)
    return model


def idx(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (3, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_gives_nanogpts_logits(tmp_path, bias, wrapper):
    theirs, content = nano(bias=bias)
    content["model"] = {f"{wrapper}{name}": weight for name, weight in content["model"].items()}
    path = saved(tmp_path, content)
    for source in (path, path / "ckpt.pt"):
        model, tokenizer = gptfast.load(source)
        assert tokenizer is None and not model.training
        tokens = idx(len(CHARS))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), theirs(tokens), atol=BUDGET, rtol=0)
        config = model.config
        assert config.tie_weights and model.lm_head.weight is model.wte.weight
        assert (config.dropout, config.attn_proj_dropout, config.padding_idx) == (0.1, True, None)


def test_old_checkpoints_have_masks_and_fewer_arguments(tmp_path):
    theirs, content = nano()
    for name in ("bias", "dropout"):
        del content["model_args"][name]
    mask = torch.ones(1, 1, 16, 16).tril()
    content["model"] |= {f"transformer.h.{layer}.attn.bias": mask for layer in range(2)}
    model, _ = nanogpt.read(saved(tmp_path, content))
    assert (model.config.bias, model.config.dropout) == (True, 0.0)
    with torch.no_grad():
        found, expected = model(idx(len(CHARS))), theirs(idx(len(CHARS)))
    torch.testing.assert_close(found, expected, atol=BUDGET, rtol=0)


def test_a_head_of_its_own_stays_one(tmp_path):
    _, content = nano()
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    model, _ = nanogpt.read(saved(tmp_path, content))
    assert not model.config.tie_weights
    assert torch.equal(model.lm_head.weight, model.wte.weight + 1)


def test_the_model_keeps_its_weights_when_the_file_changes(tmp_path):
    theirs, content = nano()
    model, _ = nanogpt.read(saved(tmp_path, content))
    file = tmp_path / "ckpt.pt"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(model.wte.weight, theirs.lm_head.weight)


@pytest.mark.parametrize("beside", [True, False])
def test_the_characters_are_those_of_the_data_set(tmp_path, beside):
    theirs, content = nano()
    run = saved(tmp_path / "out", content, meta() if beside else None)
    if not beside:
        folder = tmp_path / "data" / "hamlet"
        folder.mkdir(parents=True)
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta()))
    model, tokenizer = nanogpt.read(run)
    assert tokenizer == CharTokenizer(CHARS, padded=False)
    ids = [CHARS.index(char) for char in "to be"]
    assert tokenizer.encode("to be") == ids
    [found] = generate(model, ["to be"], tokenizer=tokenizer, max_new_tokens=30, temperature=0)
    assert found.tokens == theirs.greedy(ids, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itos": {0: "a"}}, f"it has 1 ids, and the model's vocab_size is {len(CHARS)}"),
        ({"itos": [*CHARS]}, "expected a dict with 'itos'"),
        ({"itos": {i + 1: char for i, char in enumerate(CHARS)}}, "expected a dict with 'itos'"),
        ({"itos": dict(enumerate(("be", *CHARS[1:])))}, "holds single characters, got 'be'"),
        ({"itos": dict(enumerate((CHARS[1], *CHARS[1:])))}, "holds distinct characters"),
        ({"itos": dict.fromkeys(range(len(CHARS)), "")}, "at least one character"),
        ({"stoi": {}}, "'stoi' is not the inverse"),
        ({"stoi": Path("x")}, r"damaged or unreadable \(it names pathlib"),
    ],
)
def test_another_meta_is_refused(tmp_path, changes, message):
    path = saved(tmp_path, nano()[1], meta() | changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        nanogpt.read(path)
    assert "meta.pkl" in str(caught.value) and "\n" not in str(caught.value)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "caught")


def test_nothing_in_a_file_is_run(tmp_path):
    trap, content = Trap(tmp_path / "caught"), nano()[1]
    pickle.loads(pickle.dumps(trap))
    trap.file.unlink()  # it works
    path = saved(tmp_path / "run", content, meta() | {"stoi": trap})
    with pytest.raises(CheckpointError, match="only plain values are read"):
        nanogpt.read(path)
    saved(path, content | {"config": trap})
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        nanogpt.read(path)
    assert not trap.file.exists()


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model_args", None, "not nanoGPT's checkpoint"),
        ("model", None, "not nanoGPT's checkpoint"),
        ("model_args", {"n_head": None}, "its model_args lack 'n_head'"),
        ("model_args", {"use_rmsnorm": True}, "have 'use_rmsnorm', which it has not"),
        ("model_args", {"n_head": 5}, "model_args are not valid: n_embd must be divisible"),
        ("model_args", {"n_layer": 3}, "it lacks h.2.attn.c_attn.bias and 11 more"),
        ("model_args", {"bias": False}, "it has unexpected h.0.attn.c_attn.bias"),
        ("model", {"lm_head.weight": None}, "it lacks lm_head.weight"),
        ("model", {"transformer.wpe.weight": 1}, "wpe.weight is a int, expected a tensor"),
        ("model", {"wpe.weight": torch.zeros(16, 32)}, "it has wpe.weight twice"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, part, changes, message):
    content = nano()[1]
    if changes is None:
        del content[part]
    else:
        values = content[part] | changes
        content[part] = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        nanogpt.read(saved(tmp_path, content))
    assert "ckpt.pt" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="not nanoGPT's checkpoint"):
        nanogpt.read(saved(tmp_path, [1]))


def test_odd_contents_are_one_sentence(tmp_path):
    _, content = nano()
    model, args = content["model"], content["model_args"]
    huge = torch.zeros(1, 1).expand(10**7, 10**6)
    for changes, message in (
        ({"model_args": args | {"vocab_size": None}}, "its model_args lack 'vocab_size'"),
        ({"model_args": args | {"bias": torch.tensor([1, 0])}}, "bias must be True or False, got"),
        ({"model": model | {"transformer.wpe.weight": huge}}, "damaged or unreadable"),
        (
            {"model": {name: weight.to_sparse() for name, weight in model.items()}},
            "damaged or unreadable|expected a dense",
        ),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            nanogpt.read(saved(tmp_path, content | changes))
        assert "\n" not in str(error.value)
    for dataset in ("x" * 5000, "\ud800", "a\0b"):  # names that no file has
        found, _ = nanogpt.read(saved(tmp_path, content | {"config": {"dataset": dataset}}))
        assert found.config.vocab_size == args["vocab_size"]


def test_a_model_of_another_format_is_not_hidden(tmp_path):
    gptfast.export(own(), None, tmp_path, to="hf")
    with pytest.raises(CheckpointError, match="config.json is there, of a model that readers"):
        gptfast.export(own(), None, tmp_path, to="nanogpt", overwrite=True)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="ckpt.pt: no such file"):
        nanogpt.read(tmp_path)
    file = tmp_path / "ckpt.pt"
    for content in (b"", b"text", pickle.dumps([1])):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="ckpt.pt: the file is damaged or unreadable"):
            nanogpt.read(tmp_path)
        with pytest.raises(CheckpointError, match="ckpt.pt: the file is damaged or unreadable"):
            gptfast.load(file)


def loaded(folder: Path) -> tuple[NanoGPT, dict[str, Any]]:
    """Does what nanoGPT's sample.py and train.py do with `--init_from=resume`."""
    content = torch.load(folder / "ckpt.pt", weights_only=True)
    model = NanoGPT(**content["model_args"])
    model.load_state_dict(content["model"], strict=True)
    optimizer = model.optimizer()
    before = optimizer.state_dict()
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.state_dict() == before  # AdamW's before the first step
    assert (content["iter_num"], content["best_val_loss"]) == (0, 1e9)
    return model.eval(), content


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [len(CHARS) + 1, 50])
def test_nanogpt_loads_what_is_written(tmp_path, bias, vocab_size):
    model, tokenizer = own(bias=bias, vocab_size=vocab_size), CharTokenizer(CHARS)
    nanogpt.write(model, tokenizer, tmp_path / "hamlet")
    theirs, content = loaded(tmp_path / "hamlet")
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(idx(vocab_size)), model(idx(vocab_size)), atol=BUDGET, rtol=0
        )
    assert content["config"]["dataset"] == "hamlet"
    codes = pickle.loads((tmp_path / "hamlet" / "meta.pkl").read_bytes())
    ids = [codes["stoi"][char] for char in "to be"]
    assert ids == tokenizer.encode("to be")
    assert "".join(codes["itos"][i] for i in range(vocab_size)) == "".join(CHARS)
    [found] = generate(model, ["to be"], tokenizer=tokenizer, max_new_tokens=20, temperature=0)
    assert found.tokens == theirs.greedy(ids, 20)
    again, same = nanogpt.read(tmp_path / "hamlet")
    assert same == tokenizer
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_nanogpts_own_checkpoint_comes_back(tmp_path):
    _, content = nano()
    model, tokenizer = nanogpt.read(saved(tmp_path / "out", content, meta()))
    nanogpt.write(model, tokenizer, tmp_path / "again")
    _, again = loaded(tmp_path / "again")
    assert again["model_args"] == content["model_args"]
    assert again["model"].keys() == content["model"].keys()
    for name, weight in content["model"].items():
        assert torch.equal(again["model"][name], weight), name
    assert pickle.loads((tmp_path / "again" / "meta.pkl").read_bytes()) == meta()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie_weights": False}, "a head of its own"),
        ({"attention": False}, "blocks without attention"),
        ({"gelu": "tanh"}, "the tanh approximation of GELU"),
    ],
)
def test_what_nanogpt_has_not_is_refused(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=f"nanoGPT has no models with {message}"):
        nanogpt.write(own(**fields), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def gpt2_like(merges: list[tuple[str, str]]) -> BPETokenizer:
    """A tokenizer with its ids in GPT-2's order."""
    tokens = [*map(chr, BYTE_SYMBOLS), *map("".join, merges), END_OF_TEXT]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": len(tokens) - 1, "content": END_OF_TEXT, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    form = {
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": words,
        "decoder": words,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }
    return BPETokenizer(json.dumps(form), END_OF_TEXT)


def test_of_byte_pairs_nanogpt_has_gpt2s_alone(tmp_path, monkeypatch):
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    model, tokenizer = own(vocab_size=300, padding_idx=None), gpt2_like(merges)
    with pytest.raises(CheckpointError, match="those of characters and GPT-2's, this is another"):
        nanogpt.write(model, tokenizer, tmp_path / "out")
    lines = "".join(f"{a} {b}\n" for a, b in merges)  # as the file merges.txt has them
    hashed = hashlib.sha256(f"#version: 0.2\n{lines}".encode()).hexdigest()
    monkeypatch.setattr(nanogpt, "_GPT2_MERGES", hashed)
    nanogpt.write(model, tokenizer, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["ckpt.pt"]
    assert loaded(tmp_path / "out")[1]["config"] == {}
    swapped = tokenizer.json.replace('"!":0,"\\"":1', '"!":1,"\\"":0')
    assert swapped != tokenizer.json
    assert not nanogpt.is_gpt2(BPETokenizer(swapped, END_OF_TEXT))


def test_gpt2s_own_tokenizer_is_known():
    try:
        tokenizer = BPETokenizer.load("gpt2")
    except GptfastError as error:  # it is not there, or the library is missing
        pytest.skip(f"{error}")
    assert nanogpt.is_gpt2(tokenizer)


def test_what_differs_there_is_said(tmp_path):
    with pytest.warns(UserWarning, match="sample.py takes its texts as GPT-2's tokens"):
        nanogpt.write(own(), None, tmp_path / "out")
    with pytest.warns(UserWarning, match="rounds float64 weights to float32"):
        nanogpt.write(own().double(), CharTokenizer(CHARS), tmp_path / "out")


@pytest.mark.filterwarnings("ignore:without a tokenizer")
def test_characters_of_another_model_are_neither_taken_nor_removed(tmp_path):
    nanogpt.write(own(), CharTokenizer(CHARS), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="meta.pkl is there, which would be taken for the mo"):
        nanogpt.write(own(), None, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_write_that_fails_keeps_what_was_there(tmp_path, monkeypatch, disk_full):
    nanogpt.write(own(), CharTokenizer(CHARS), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        nanogpt.write(own(bias=False), CharTokenizer(("x",)), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
