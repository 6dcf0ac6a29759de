"""The presets: which there are, and what they train."""

from dataclasses import replace

import pytest
import torch

from gptfast.errors import ConfigError
from gptfast.model import GPT
from gptfast.presets import PRESETS, preset
from gptfast.training import train


def test_the_presets_are_the_courses_runs():
    abc, shakespeare = preset("abc"), preset("shakespeare")
    assert (abc.model.block_size, shakespeare.model.block_size) == (16, 64)
    assert (abc.model.vocab_size, shakespeare.model.vocab_size) == (None, None)
    assert (abc.train.steps, abc.train.epochs, abc.train.batch_size) == (400, None, 64)
    assert (abc.train.lr, abc.train.clip, abc.train.val_fraction) == (0.003, None, 0.2)
    assert (shakespeare.train.steps, shakespeare.train.epochs) == (None, 3)
    assert (shakespeare.train.lr, shakespeare.train.clip) == (0.001, 1.0)
    assert (shakespeare.train.text_fraction, shakespeare.train.val_fraction) == (0.3, 0.1)
    assert shakespeare.train.eval_every is None  # after each epoch
    other = preset("shakespeare-no-attention")
    assert replace(other.model, attention=True) == shakespeare.model
    assert other.train == shakespeare.train and not other.model.attention


def test_every_preset_says_what_it_is_and_has_a_text_or_says_that_it_has_none(tmp_path):
    assert all(name == p.name and p.help for name, p in PRESETS.items())
    assert [name for name, p in PRESETS.items() if p.text is None] == ["gpt2"]
    with pytest.raises(ConfigError, match="'gpt2' has no text of its own: give one"):
        train("gpt2", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_presets_of_nanogpt_have_its_sizes():
    sizes = {"shakespeare-cpu": (66, 804_224), "gpt2": (50_304, 124_373_760)}
    for name, (vocab_size, parameters) in sizes.items():
        with torch.device("meta"):
            model = GPT(replace(preset(name).model, vocab_size=vocab_size))
        assert sum(param.numel() for param in model.parameters()) == parameters
    cpu, gpt2 = preset("shakespeare-cpu").train, preset("gpt2").train
    assert (cpu.steps, cpu.warmup_steps, cpu.lr, cpu.min_lr) == (2000, 100, 1e-3, 1e-4)
    assert gpt2.batch_size // gpt2.accumulation_steps == 12
    assert (gpt2.steps, gpt2.warmup_steps, gpt2.lr, gpt2.min_lr) == (600_000, 2000, 6e-4, 6e-5)


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'abd'.*abc, gpt2, shakespeare"):
        train("abd")
