"""GPT-2 of Hugging Face: gptfast computes what the real transformers does."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast import GPT, BPETokenizer
from gptfast.formats import huggingface
from gptfast.testing import assert_budget

transformers = pytest.importorskip("transformers", reason="compares with Hugging Face's models")
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

TEXT = "It's the café's façade — naïve 🤗 12 345!\n\n  The cat sat on the mat.\n" * 20
V = 310
BPE = BPETokenizer.train(TEXT, V)
SMALL: dict[str, Any] = {"vocab_size": 101, "n_positions": 33, "n_embd": 24, "n_layer": 2}
SMALL |= {"n_head": 3, "bos_token_id": None, "eos_token_id": None}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Shows no bars."""
    transformers.utils.logging.disable_progress_bar()
    yield


def random_gpt2(kind: type = GPT2LMHeadModel, **options: Any) -> Any:
    """A GPT-2 of transformers in evaluation mode, whose every weight matters."""
    config = GPT2Config(**{**SMALL, **dict.fromkeys(DROPOUTS, 0.0), **options})
    torch.manual_seed(1)
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        # Norms around 1, as in trained models, so that no layer's result vanishes.
        torch.nn.init.normal_(weight, 1.0 if ".ln_" in name and "weight" in name else 0.0, 0.2)
    return model


def tokens(model: Any, rows: int = 3) -> Tensor:
    """Random tokens (B, T) that fill the window."""
    shape = (rows, model.config.n_positions)
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))


def loaded(path: Path) -> GPT:
    model, tokenizer = gptfast.load(path)
    assert tokenizer is None and not model.training
    return model


CONFIGS: dict[str, dict[str, Any]] = {
    "gelu_new": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "untied": {"tie_word_embeddings": False},
    "untied erf": {"tie_word_embeddings": False, "activation_function": "gelu"},
    "one layer, one head": {"n_layer": 1, "n_head": 1, "n_embd": 7, "vocab_size": 13},
    "odd": {"n_layer": 3, "n_head": 5, "n_embd": 35, "vocab_size": 50, "n_positions": 17},
    "n_inner": {"n_inner": 96},
    "upcast": {"reorder_and_upcast_attn": True},
}


def results_of(model: Any, idx: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of transformers, the latter with gptfast's names and layout."""
    found = model(idx[:, :-1])
    loss = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), idx[:, 1:].flatten())
    params = dict(model.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            grads[f"{name}.weight"] = grads[f"{name}.weight"].t()
    return found.logits, loss, {k.removeprefix("transformer."): v for k, v in grads.items()}


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_are_those_of_transformers(
    name: str, backend: Any, tmp_path: Path
) -> None:
    """The budget is the package's: twice transformers' own error, for gradients three times."""
    theirs = random_gpt2(**CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours, idx = loaded(tmp_path), tokens(theirs)
    ours.backend = backend
    oracle = results_of(copy.deepcopy(theirs).double(), idx)
    own = results_of(theirs, idx)
    logits, loss = ours(idx[:, :-1]), ours.loss(idx[:, :-1], idx[:, 1:])
    assert isinstance(logits, Tensor)
    assert (logits - own[0]).abs().max() < 1e-4
    assert_budget("logits", logits, own[0], oracle[0], 2.0)
    # Errors of tokens can cancel in transformers' mean by chance: one of the logits' size.
    error = (own[0].double() - oracle[0]).abs().max().item()
    assert abs(loss.item() - oracle[1].item()) <= 2 * error
    params = dict(ours.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()))
    assert params.keys() == own[2].keys()
    scale = max(grad.abs().max().item() for grad in oracle[2].values())
    for param, grad in zip(params, grads, strict=True):
        assert_budget(param, grad, own[2][param], oracle[2][param], 3.0, scale)


# ---- files in which the same model lies


def torch_files(model: Any, path: Path, old: bool = False, **extra: Tensor) -> None:
    """Writes what earlier versions of transformers did: pytorch_model.bin."""
    model.config.save_pretrained(path)
    state = model.state_dict() | extra
    file = path / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=not old)


def shards(model: Any, path: Path, suffix: str) -> None:
    """Writes the weights into two files with an index."""
    from safetensors.torch import save_file

    model.config.save_pretrained(path)
    state, places = model.state_dict(), {}
    state.pop("lm_head.weight")
    names = sorted(state)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        content = {name: state[name].contiguous() for name in part}
        save_file(content, path / file) if suffix == "safetensors" else torch.save(
            content, path / file
        )
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def buffers(model: Any) -> dict[str, Tensor]:
    """The causal masks that earlier versions of transformers kept with the weights."""
    found = {}
    for layer in range(model.config.n_layer):
        found[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 33, 33, dtype=torch.uint8)
        found[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return found


FORMS: dict[str, Any] = {
    "sharded by transformers": lambda model, path: model.save_pretrained(
        path, max_shard_size="20KB"
    ),
    "sharded .bin": lambda model, path: shards(model, path, "bin"),
    "sharded .safetensors": lambda model, path: shards(model, path, "safetensors"),
    ".bin": torch_files,
    ".bin of torch before 1.6": lambda model, path: torch_files(model, path, True),
    ".bin with buffers": lambda model, path: torch_files(model, path, **buffers(model)),
    "without prefix": lambda model, path: model.transformer.save_pretrained(path),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_lies_in_files_of_many_forms(form: str, tmp_path: Path) -> None:
    theirs = random_gpt2()
    theirs.save_pretrained(tmp_path / "plain")
    (tmp_path / "form").mkdir()
    FORMS[form](theirs, tmp_path / "form")
    several = len([*(tmp_path / "form").glob("*-of-*")]) > 1
    assert several == form.startswith("sharded")
    expected, found = loaded(tmp_path / "plain"), loaded(tmp_path / "form")
    assert found.config == expected.config and found.lm_head.weight is found.wte.weight
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
        assert weight.is_contiguous()


def test_the_base_model_alone(tmp_path: Path) -> None:
    theirs = random_gpt2(GPT2Model)
    theirs.save_pretrained(tmp_path)
    idx = tokens(theirs)
    hidden = loaded(tmp_path)(idx, return_intermediates=True)
    assert isinstance(hidden, gptfast.Intermediates)
    assert (hidden.hidden - theirs(idx).last_hidden_state).abs().max() < 1e-5


def test_the_weights_do_not_change_with_their_file(tmp_path: Path) -> None:
    torch_files(random_gpt2(), tmp_path)
    model = loaded(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with open(tmp_path / "pytorch_model.bin", "r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_that_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = random_gpt2().to(dtype)
    theirs.save_pretrained(tmp_path / "a")
    ours = loaded(tmp_path / "a")
    assert {weight.dtype for weight in ours.parameters()} == {dtype}
    (found,) = gptfast.generate(ours, [[1, 2]], max_new_tokens=3)
    assert len(found.tokens) == 3
    huggingface.write(ours, None, tmp_path / "b")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "b", dtype="auto")
    assert again.dtype == dtype
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


def test_dropout(tmp_path: Path) -> None:
    random_gpt2(**dict.fromkeys(DROPOUTS, 0.25)).save_pretrained(tmp_path / "one")
    config = loaded(tmp_path / "one").config
    assert (config.dropout, config.attn_proj_dropout) == (0.25, True)
    random_gpt2(resid_pdrop=0.25).save_pretrained(tmp_path / "three")
    named = "embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.25"
    with pytest.warns(UserWarning, match=f"one dropout, and this model three .{named}.: it is"):
        assert loaded(tmp_path / "three").config.dropout == 0.0
    content = json.loads((tmp_path / "three" / "config.json").read_text())
    for name in DROPOUTS:
        del content[name]
    (tmp_path / "three" / "config.json").write_text(json.dumps(content))
    assert loaded(tmp_path / "three").config.dropout == 0.1


# ---- generation


PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26, 8], [1, 2]]


def greedy(model: Any, prompts: list[list[int]], new: int, end: int | None) -> list[list[int]]:
    """The tokens that transformers generates for a batch padded on the left."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    texts = [row[width:] for row in found.tolist()]
    return [text[: text.index(end)] if end in text else text for text in texts]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_greedy_tokens_are_those_of_transformers(backend: Any, tmp_path: Path) -> None:
    theirs = random_gpt2(vocab_size=V, n_positions=40)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    ours.backend = backend
    free = greedy(theirs, PROMPTS, 30, None)
    found = gptfast.generate(ours, PROMPTS, max_new_tokens=30, temperature=0)
    assert [each.tokens for each in found] == free and len({*free[0]}) > 5
    end = free[1][12]
    token = next(token for token, i in json.loads(BPE.json)["model"]["vocab"].items() if i == end)
    added = {"id": end, "content": token, "special": True, "normalized": False}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content = json.loads(BPE.json)
    ending = BPETokenizer(json.dumps(content | {"added_tokens": [added]}), token)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0, "tokenizer": ending}
    found = gptfast.generate(ours, PROMPTS, **options)
    stopped = greedy(theirs, PROMPTS, 30, end)
    assert [each.tokens for each in found] == stopped and len(stopped[1]) <= 12
    reasons = ["end" if len(text) < 30 else "length" for text in stopped]
    assert [each.finish_reason for each in found] == reasons
    found = gptfast.generate(ours, PROMPTS, stop_at_end=False, **options)
    assert [each.tokens for each in found] == free
