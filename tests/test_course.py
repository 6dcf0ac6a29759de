"""Weights with the course's names, from files and from memory."""

import pickle
from pathlib import Path

import pytest
import torch
from peers import CourseGPT
from safetensors.torch import save_file

import gptfast
from gptfast import CheckpointError, ConfigError, GPTConfig
from gptfast.formats import course

SMALL = GPTConfig(block_size=20, vocab_size=11, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
Weights = dict[str, torch.Tensor]


def weights(attention: bool = True) -> Weights:
    torch.manual_seed(1)
    config = GPTConfig(**SMALL.to_dict() | {"attention": attention})
    return CourseGPT(config).state_dict()


def saved(file: Path, content: Weights) -> Path:
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    return file


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_model_of_its_weights(tmp_path, name, dtype):
    content = {name: weight.to(dtype) for name, weight in weights().items()}
    file = saved(tmp_path / name, content)
    model, tokenizer = gptfast.load(file, n_head=2)
    assert tokenizer is None and not model.training
    assert (model.config.n_head, model.config.attention) == (2, True)
    for name, weight in content.items():
        own = model.get_parameter(course.own_name(name))
        assert own.dtype == dtype and torch.equal(own, weight), name


def test_the_model_keeps_its_weights_when_the_file_changes(tmp_path):
    content = weights()
    file = saved(tmp_path / "weights.pt", content)
    model, _ = course.read(file, 2)
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(model.wte.weight, content["wte.weight"])


def test_a_model_without_attention(tmp_path):
    model, _ = course.read(saved(tmp_path / "weights.safetensors", weights(False)), 2)
    assert not model.config.attention


def test_the_number_of_heads_must_be_given(tmp_path):
    file = saved(tmp_path / "weights.safetensors", weights())
    with pytest.raises(ConfigError, match="do not tell how many heads there are: gptfast.load"):
        course.read(file, None)
    with pytest.raises(ConfigError, match="n_embd=32 and n_head=3"):
        course.read(file, 3)


def test_weights_that_do_not_fit_are_named():
    state = weights()
    with pytest.raises(CheckpointError, match="expected a matrix 'wpe.weight', as the course's"):
        course.from_state_dict({"a": torch.zeros(1)}, 2)
    missing = {name: weight for name, weight in state.items() if name != "scale2.1.bias"}
    with pytest.raises(CheckpointError, match="it lacks h.1.ln_2.bias"):
        course.from_state_dict(missing, 2)
    wrong = state | {"FFN.0.2.weight": torch.zeros(32, 64)}
    with pytest.raises(CheckpointError, match=r"has shape \(32, 64\), expected \(32, 128\)"):
        course.from_state_dict(wrong, 2)


def test_from_memory_the_model_has_copies():
    state = weights()
    model = course.from_state_dict(state, 2)
    state["wte.weight"].zero_()
    assert model.wte.weight.any()


def test_other_files_are_not_the_courses(tmp_path):
    for name in ("other.pt", "other.safetensors"):
        file = saved(tmp_path / name, {"wte.weight": torch.zeros(2, 2)})
        with pytest.raises(CheckpointError, match=f"{name}: expected ckpt.pt of nanoGPT, or"):
            gptfast.load(file, n_head=2)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="list.pt: expected weights by name, got a list"):
        course.read(tmp_path / "list.pt", 2)


@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    file = tmp_path / name
    for content in (b"", b"no file of weights", pickle.dumps(Path("."))):
        file.write_bytes(content)
        for read in (gptfast.load, course.read):
            with pytest.raises(CheckpointError, match=f"{name}: the file is damaged or unread"):
                read(file, n_head=2)
