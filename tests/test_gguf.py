"""GGUF files: read back by the package gguf, by transformers and by llama.cpp."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast import GPT, BPETokenizer, CharTokenizer, CheckpointError, ConfigError, GPTConfig
from gptfast.bpe_files import BYTE_SYMBOLS
from gptfast.formats import gguf as formats
from gptfast.formats.gguf_tokens import Tokens, tokens_of

gguf = pytest.importorskip("gguf", reason="GGUF is written by the package gguf")

TEXT = "To be, or not to be:\n\tthat is  the question.\n"
EUROPE = TEXT + "Être où n'être pas — «Ça»? 東京 🙂🙃 ÃĀ"
CHARS = CharTokenizer.from_text(TEXT)
SHAPE = GPTConfig(
    block_size=32, vocab_size=CHARS.vocab_size, n_embd=32, dropout=0.0, gelu="tanh", init="gpt2"
)


def made(**fields: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(replace(SHAPE, **fields)).eval()
    for param in model.parameters():  # biases, norms and differences of logits that matter
        torch.nn.init.normal_(param, mean=float(param.dim() < 2), std=0.2)
    return model


def idx(model: GPT, T: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.config.vocab_size, (1, T), generator=generator)


def byte_pairs(text: str = TEXT * 20) -> BPETokenizer:
    pytest.importorskip("tokenizers", reason="byte-pair encoding needs the library tokenizers")
    return BPETokenizer.train(text, 280)


def quietly(model: GPT, tokenizer: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        formats.write(model, tokenizer, path)
    return formats.file_of(path)


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


# The tensors and the metadata


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_bit_for_bit(tmp_path, bias, tied):
    model = made(bias=bias, tie_weights=tied)
    found = {each.name: each for each in gguf.GGUFReader(quietly(model, None, tmp_path)).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)  # from transformers' to llama.cpp's
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        theirs = name if name == "lm_head.weight" else f"transformer.{name}"
        tensor = found.pop(names.get_name(theirs, (".weight", ".bias")))
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, weight.numpy()), name
    norms = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    zeros = {f"blk.{layer}.{norm}.bias" for layer in range(2) for norm in norms}
    assert found.keys() == (set() if bias else zeros | {"output_norm.bias"})
    assert not any(tensor.data.any() for tensor in found.values())


def test_the_sizes_are_in_the_metadata(tmp_path):
    found = fields(quietly(made(n_head=4, n_layer=3), None, tmp_path))
    expected = {
        "context_length": 32,
        "embedding_length": 32,
        "feed_forward_length": 128,
        "block_count": 3,
        "attention.head_count": 4,
        "vocab_size": CHARS.vocab_size,
    }
    assert {name: found[f"gpt2.{name}"] for name in expected} == expected
    assert found["gpt2.attention.layer_norm_epsilon"] == np.float32(1e-5)
    assert found["general.architecture"] == "gpt2"
    assert found["tokenizer.ggml.model"] == "none" and "tokenizer.ggml.tokens" not in found


@pytest.mark.parametrize(("dtype", "kind", "number"), [
    (torch.bfloat16, "BF16", 32), (torch.float16, "F16", 1), (torch.float32, "F32", 0),
])  # fmt: skip
def test_matrices_keep_their_dtype(tmp_path, dtype, kind, number):
    model = made().to(dtype)
    file = quietly(model, None, tmp_path)
    assert fields(file)["general.file_type"] == number
    tensors = {each.name: each for each in gguf.GGUFReader(file).tensors}
    for name, own in (("token_embd", "wte"), ("blk.1.ffn_up", "h.1.mlp.c_fc")):
        tensor, weight = tensors[f"{name}.weight"], model.state_dict()[f"{own}.weight"]
        assert tensor.tensor_type.name == kind
        assert tensor.shape.tolist() == [*reversed(weight.shape)]
        assert tensor.data.tobytes() == weight.view(torch.uint8).numpy().tobytes()
    for name, own in (("position_embd.weight", "wpe.weight"), ("output_norm.bias", "ln_f.bias")):
        assert tensors[name].tensor_type.name == "F32"
        assert np.array_equal(tensors[name].data, model.state_dict()[own].float().numpy())


def test_what_llama_cpp_computes_otherwise_is_said(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        formats.write(made(), None, tmp_path)
    with pytest.warns(UserWarning, match="computes GELU by its tanh approximation"):
        formats.write(made(gelu="erf"), None, tmp_path)
    with pytest.warns(UserWarning, match="leaves out the characters .* does not have"):
        formats.write(made(), CHARS, tmp_path)
    with pytest.warns(UserWarning, match="float64: such weights are rounded to float32"):
        formats.write(made().double(), None, tmp_path)


def test_blocks_without_attention_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no models with blocks without attention"):
        formats.write(made(attention=False), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'gptfast-kernels\[gguf\]'"):
        formats.write(made(), None, tmp_path)


def test_a_write_that_fails_keeps_what_was_there(tmp_path, monkeypatch, disk_full):
    file = quietly(made(), None, tmp_path / "small.gguf")
    before = file.read_bytes()

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        formats.write(made(n_layer=1), None, file)
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["small.gguf"]


# The tokenizers


def tokenized(tokens: Tokens, words: list[str]) -> list[int]:
    """llama.cpp's algorithm: merges the pair of lowest rank in each word; drops what has no id."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(tokens.merges)}
    ids = {text: i for i, text in enumerate(tokens.texts)}
    found = []
    for word in words:
        parts = [*word]
        while True:
            pairs = [*zip(parts, parts[1:], strict=False)]
            known = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
            if not known:
                break
            _, i = min(known)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        found += [ids[part] for part in parts if part in ids]
    return found


def symbols(text: str) -> str:
    spelled = {ord(byte): chr(symbol) for symbol, byte in BYTE_SYMBOLS.items()}
    return text.encode().decode("latin-1").translate(spelled)


@pytest.mark.parametrize("text", [TEXT, EUROPE])
def test_each_character_has_its_id(text):
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokens_of(tokenizer, tokenizer.vocab_size + 3)
    assert tokenized(tokens, [symbols(text)]) == tokenizer.encode(text)
    assert tokenized(tokens, [*map(symbols, text.split("e"))]) == tokenizer.encode(
        text.replace("e", "")
    )
    other = "zÀà京都🙈"  # some share their first bytes with those of the vocabulary
    kept = tokenizer.encode(other + text, unknown="skip")
    assert tokenized(tokens, [symbols(other + text)]) == kept
    assert tokens.end == 0
    unused = [i for i, kind in enumerate(tokens.types) if kind == 5]
    assert unused == [0, *range(tokenizer.vocab_size, tokenizer.vocab_size + 3)]


def test_byte_pairs_go_over_as_they_are():
    tokenizer = byte_pairs()
    tokens = tokens_of(tokenizer, 300)
    import tokenizers

    cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert tokenized(tokens, [word for word, _ in cut(EUROPE)]) == tokenizer.encode(EUROPE)
    assert tokens.end == tokenizer.end_of_text
    assert tokens.texts[tokens.end] == "<|endoftext|>" and tokens.types[tokens.end] == 3
    own = tokenizer.vocab_size
    assert tokens.texts[own:] == [f"[PAD{i}]" for i in range(own, 300)]
    assert tokens.types[own:] == [5] * (300 - own)


def test_the_tokenizer_is_in_the_metadata(tmp_path):
    tokenizer = CharTokenizer.from_text(EUROPE)
    found = fields(quietly(made(vocab_size=80), tokenizer, tmp_path))
    tokens = tokens_of(tokenizer, 80)
    names = ("tokens", "token_type", "merges", "eos_token_id", "bos_token_id")
    values = (tokens.texts, tokens.types, tokens.merges, 0, 0)
    for name, value in zip(names, values, strict=True):
        assert found[f"tokenizer.ggml.{name}"] == value, name
    kinds = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.token_type"].types
    assert [kind.name for kind in kinds] == ["ARRAY", "INT32"]  # llama.cpp takes no other
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.add_bos_token"] is found["tokenizer.ggml.add_eos_token"] is False


def test_where_every_id_stands_for_text_none_can_end_one():
    tokenizer = CharTokenizer(("a", "b"), padded=False)
    with pytest.raises(CheckpointError, match="needs an id that ends a text, and each of .* 2 ids"):
        tokens_of(tokenizer, 2)
    tokens = tokens_of(tokenizer, 3)
    assert (tokens.end, tokens.texts) == (2, ["a", "b", "[PAD2]"])
    pytest.importorskip("tokenizers", reason="byte-pair encoding needs the library tokenizers")
    with pytest.raises(CheckpointError, match="needs an id that ends a text"):
        tokens_of(BPETokenizer.train(TEXT, 256, ending=None), 256)


def test_halves_of_surrogate_pairs_are_refused():
    with pytest.raises(CheckpointError, match=r"does not have the tokenizer's character '\\ud83d'"):
        tokens_of(CharTokenizer(("a", "\ud83d")), 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"ignore_merges": True}},
    ],
)
def test_tokenizers_that_cut_otherwise_are_refused(changes):
    form = json.loads(byte_pairs().json)
    for name, value in changes.items():
        form[name] = form[name] | value if name == "model" else value
    with pytest.raises(CheckpointError, match="cuts texts into words as GPT-2 does, and this"):
        tokens_of(BPETokenizer(json.dumps(form), "<|endoftext|>"), 300)


# Other programs


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="it reads the file")
    # It does not read the context's length from the file, and refuses another than GPT-2's.
    model = made(block_size=1024, tie_weights=tied)
    quietly(model, CHARS, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert theirs.config.activation_function == "gelu_new"  # the tanh approximation
    tokens = idx(model)
    with torch.no_grad():
        found, expected = theirs(tokens).logits, model(tokens)
    # Float32 sums in another order, over logits of about 6; 1.4e-6 so far.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def llama(model: GPT, tokenizer: Any, folder: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp reads the file")
    file = quietly(model, tokenizer, folder)
    options = {"n_ctx": 32, "n_batch": 32, "n_threads": 1, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(file), **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_llama_cpp_computes_the_same_logits(tmp_path, bias, tied, gelu):
    model = made(bias=bias, tie_weights=tied, gelu=gelu)
    other = llama(model, CHARS, tmp_path)
    tokens = idx(model)
    other.eval(tokens[0].tolist())
    with torch.no_grad():
        expected = model(tokens)[0].numpy()
    error = np.abs(np.array(other.scores[: len(expected)]) - expected).max()
    # Its GELU is a table in float16, and so are its keys and values.
    assert error <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["ascii", "europe", "pairs"])
def test_llama_cpp_reads_and_writes_the_same_tokens(tmp_path, kind):
    text = TEXT if kind == "ascii" else EUROPE
    tokenizer: Any = byte_pairs() if kind == "pairs" else CharTokenizer.from_text(text)
    model = made(vocab_size=tokenizer.vocab_size + 2)
    other = llama(model, tokenizer, tmp_path)
    ids = other.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(text)
    assert other.detokenize(ids).decode() == text
    assert other.token_eos() == tokens_of(tokenizer, model.config.vocab_size).end
    unknown = "zÀà京都🙈" + text  # what has no token is left out
    assert other.tokenize(unknown.encode(), add_bos=False, special=False) == tokenizer.encode(
        unknown, unknown="skip"
    )
    # What stands for no text is no token of a text, nor does it write anything.
    assert other.tokenize(b"[PAD0]", add_bos=False, special=True) == tokenizer.encode(
        "[PAD0]", unknown="skip"
    )
    assert other.detokenize([model.config.vocab_size - 1]) == b""
