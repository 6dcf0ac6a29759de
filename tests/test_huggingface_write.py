"""Models of gptfast as folders of Hugging Face: transformers loads them, and they come back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gptfast
from gptfast import GPT, BPETokenizer, CharTokenizer, CheckpointError, ConfigError, GPTConfig
from gptfast.formats import huggingface

transformers = pytest.importorskip("transformers", reason="Hugging Face's library reads the files")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TEXT = "It's the café's façade — naïve 🤗 12 345!\n\n  The cat sat on the mat.\n" * 20
BPE = BPETokenizer.train(TEXT, 310)
CHARACTERS = "\t\n\r !<>ADPabcß\u00a0é\u0301\u200d\u2028一🤗\x00\x7f�ſK"
CHARS = CharTokenizer(tuple(CHARACTERS))
SPECIAL = BPE.ending or ""


def model_of(tokenizer: Any = None, **options: Any) -> GPT:
    """A random model in evaluation mode, whose every weight matters."""
    size = 29 if tokenizer is None else tokenizer.vocab_size + 2
    shape = {"block_size": 19, "vocab_size": size, "n_embd": 24, "n_head": 3, "n_layer": 2}
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**shape, "dropout": 0.0, "padding_idx": None, **options})).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    return model


def tokens(model: GPT) -> Tensor:
    shape = (3, model.config.block_size)
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))


def theirs_at(folder: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found  # nothing missing, left over or made anew
    return model.eval()


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_transformers_computes_the_same(
    tie_weights: bool, bias: bool, gelu: Any, tmp_path: Path
) -> None:
    ours = model_of(tie_weights=tie_weights, bias=bias, gelu=gelu, dropout=0.25)
    huggingface.write(ours, None, tmp_path)
    theirs, idx = theirs_at(tmp_path), tokens(ours)
    with torch.no_grad():
        logits, expected = theirs(idx).logits, ours(idx)
        found, tokenizer = gptfast.load(tmp_path)
        again = found(idx)
    assert isinstance(expected, Tensor)
    # Logits are of size 10: two orders of summation differ in the last of float32's 7 digits.
    assert (logits - expected).abs().max() < 2e-5
    assert torch.equal(again, expected) and tokenizer is None  # also with zeros for biases
    tied = theirs.lm_head.weight is theirs.transformer.wte.weight
    assert tied == tie_weights == found.config.tie_weights
    config = theirs.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    assert config.activation_function == {"erf": "gelu", "tanh": "gelu_new"}[gelu]
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (None, None, None)
    assert (found.config.gelu, found.config.dropout) == (gelu, 0.25)


# ---- tokenizers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both tokenizers as AutoTokenizer loads them; and loaded again from what it saved."""
    found = {}
    for name, tokenizer in (("bpe", BPE), ("chars", CHARS)):
        folder = tmp_path_factory.mktemp(name)
        huggingface.write(model_of(tokenizer), tokenizer, folder / "a")
        found[name] = AutoTokenizer.from_pretrained(folder / "a")
        found[name].save_pretrained(folder / "b")
        (folder / "b" / "config.json").write_text((folder / "a" / "config.json").read_text())
        for place in ("a", "b"):
            assert huggingface.read_tokenizer(folder / place) == tokenizer
            assert len(AutoTokenizer.from_pretrained(folder / place)) == tokenizer.vocab_size
    return found


@given(st.text(st.sampled_from(CHARACTERS), max_size=40))
@settings(deadline=None)
def test_any_text_of_the_characters_comes_back(written: dict[str, Any], text: str) -> None:
    theirs = written["chars"]
    for each in (text, f"{text}<PAD>{text}", f" {text} !\n\n"):
        ids = theirs(each)["input_ids"]
        assert ids == CHARS.encode(each) and theirs.decode(ids) == each
        assert theirs.decode([0, *ids, 0, 0], skip_special_tokens=True) == each


def test_padding_and_other_characters(written: dict[str, Any]) -> None:
    theirs = written["chars"]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.model_max_length) == (0, None, 19)
    padded = theirs(["a", "abc"], padding=True, padding_side="left")
    assert padded["input_ids"][0] == [0, 0, *CHARS.encode("a")]
    with pytest.raises(Exception, match=r"Missing \[UNK\] token from the vocabulary"):
        theirs("x")


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@settings(deadline=None)
def test_any_text_has_the_same_tokens(written: dict[str, Any], text: str) -> None:
    theirs = written["bpe"]
    for each in (text, f"{text} {TEXT[:60]}{text}\n {text}"):
        ids = theirs(each)["input_ids"]
        assert ids == BPE.encode(each) and theirs.decode(ids) == each


def test_special_tokens(written: dict[str, Any]) -> None:
    theirs = written["bpe"]
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == (SPECIAL, SPECIAL, None)
    assert theirs.eos_token_id == BPE.end_of_text
    assert theirs(f"a{SPECIAL}")["input_ids"] == [*BPE.encode("a"), BPE.end_of_text]


# ---- all the way


def test_a_trained_model_goes_out_and_comes_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "block_size": 48, "dropout": 0.0}
    options |= {"steps": 60, "lr": 1e-2, "batch_size": 16, "val_fraction": 0.2, "gelu": "tanh"}
    # By heart, so that no two tokens are nearly as likely.
    texts = "The cat sat on the mat, and 12 mice sat in a row.\n" * 60
    tokenizer = BPETokenizer.train(texts, 280)
    result = gptfast.train("abc", text=texts, tokenizer=tokenizer, progress=False, **options)
    huggingface.write(result.model, tokenizer, tmp_path)
    theirs, read = theirs_at(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text
    model, again = gptfast.load(tmp_path)
    assert again == tokenizer
    for prompt in ("The cat", " mice sat"):
        asked = read(prompt, return_tensors="pt")
        assert asked.keys() == {"input_ids", "attention_mask"}
        # No padding is needed; the end of a text serves to say so.
        found = theirs.generate(
            **asked, max_new_tokens=25, do_sample=False, pad_token_id=tokenizer.end_of_text
        )
        text = read.decode(found[0], skip_special_tokens=True)
        for own in (result.model, model):
            (ours,) = gptfast.generate(
                own, [prompt], tokenizer=again, max_new_tokens=25, temperature=0
            )
            assert prompt + (ours.text or "") == text and " mat, and 12 mi" in text


# ---- folders


def weights_at(folder: Path) -> dict[str, Tensor]:
    return gptfast.load(folder)[0].state_dict()


def test_a_model_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_full: Any
) -> None:
    huggingface.write(model_of(BPE, n_layer=1), BPE, tmp_path)
    huggingface.write(model_of(BPE, n_layer=3), BPE, tmp_path)
    before = weights_at(tmp_path)
    assert "h.2.ln_1.weight" in before
    names = {file.name for file in tmp_path.iterdir()}

    monkeypatch.setattr("gptfast.files.os.fsync", disk_full)
    with pytest.raises(CheckpointError, match="the model could not be exported .No space left on"):
        gptfast.export(model_of(BPE), BPE, tmp_path, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == names
    assert weights_at(tmp_path).keys() == before.keys()


def test_nothing_else_is_replaced_or_mixed_in(tmp_path: Path) -> None:
    huggingface.write(model_of(BPE), BPE, tmp_path / "with")
    with pytest.raises(CheckpointError, match="with: tokenizer.json is there, which readers would"):
        huggingface.write(model_of(), None, tmp_path / "with")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    (tmp_path / "bin" / "README.md").touch()
    with pytest.raises(CheckpointError, match="bin: pytorch_model.bin is there, which readers"):
        huggingface.write(model_of(), None, tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").unlink()
    huggingface.write(model_of(), None, tmp_path / "bin")


class Own(CharTokenizer):
    """A tokenizer of a user's."""


def changed() -> GPT:
    model = model_of()
    model.ln_f = torch.nn.LayerNorm(24, eps=1e-6)
    return model


@pytest.mark.parametrize(
    ("model", "tokenizer", "kind", "message"),
    [
        (model_of(attention=False), None, CheckpointError, "GPT-2 always has attention, this mod"),
        (changed(), None, CheckpointError, "ln_f has eps=1e-06, expected 1e-05"),
        (model_of(), BPE, CheckpointError, "has 303 ids, more than the model's vocab_size 29"),
        (
            model_of(),
            CharTokenizer(("a", "\ud83d")),
            CheckpointError,
            r"holds no half of a surrogate pair, as the tokenizer's character '\\ud83d'",
        ),
        (model_of(), Own(("a",)), ConfigError, "a tokenizer of type Own cannot be stored"),
        (torch.nn.Linear(2, 2), None, ConfigError, "expected a GPT"),
    ],
)
def test_what_gpt2_has_not(
    model: Any, tokenizer: Any, kind: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        gptfast.export(model, tokenizer, tmp_path / "new")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_a_model_within_a_wrapper(tmp_path: Path) -> None:
    model = model_of()
    gptfast.export(torch.nn.DataParallel(model), None, tmp_path)
    for name, weight in weights_at(tmp_path).items():
        assert torch.equal(weight, model.state_dict()[name])
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["GPT2LMHeadModel"] and content["torch_dtype"] == "float32"
