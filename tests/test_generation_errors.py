"""What generation refuses: logits that are not finite, models, prompts and options."""

from typing import Any

import numpy as np
import pytest
import torch
from generating import make

import gptfast
from gptfast import BackendError, ConfigError, DataError
from gptfast.generation import make_request
from gptfast.generation.engine import Engine


@pytest.mark.parametrize("dtype", (None, "bf16", "int8"))
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_a_model_without_finite_logits(backend: Any, dtype: str | None) -> None:
    model = make("course")
    model.backend = backend
    model.lm_head.weight.data[1, 0] = torch.nan
    with pytest.raises(DataError, match="the model's logits are not finite"):
        gptfast.generate(model, [[1], [2]], max_new_tokens=4, dtype=dtype)


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_logits_that_are_not_finite_name_the_prompt(backend: Any) -> None:
    model = make("course")
    model.backend = backend
    model.wte.weight.data[2] = torch.nan  # what reads this token gives no numbers
    options: dict[str, Any] = {"max_new_tokens": 1, "num_samples": 3}
    with pytest.raises(DataError, match="the model's logits are not finite for prompt 1"):
        gptfast.generate(model, [[1], [2], [3]], **options)
    assert len(gptfast.generate(model, [[1], [3]], **options)) == 6


def test_logits_that_are_not_finite_end_the_call() -> None:
    model = make("course")
    model.wte.weight.data[2] = torch.nan
    packed = gptfast.pack(model)
    prompts = [[2] if i == 1 else [1] for i in range(200)]
    engine = Engine(packed, make_request(packed, prompts, max_new_tokens=4, max_batch=2))
    with pytest.raises(DataError, match="prompt 1"):
        engine.run(60.0)
    states = [update.state for update in engine.updates()]
    assert states[:2] == ["running", "invalid"] and states[2:] == ["waiting"] * 198


def test_what_cannot_be_packed() -> None:
    model = make("course")
    with pytest.raises(ConfigError, match="dtype must be None or one of"):
        gptfast.pack(model, "int3")
    with pytest.raises(BackendError, match="pack: the fused kernels cannot run: .*not float64"):
        gptfast.pack(model.double())
    model.backend = "reference"
    with pytest.raises(BackendError, match="pack: the model's backend is 'reference'"):
        gptfast.pack(model)


def test_fused_is_asked_for_and_cannot_run() -> None:
    model = make("course").double()
    assert len(gptfast.generate(model, [[1]], max_new_tokens=3)[0].tokens) == 3
    model.backend = "fused"
    with pytest.raises(BackendError, match="not float64"):
        gptfast.generate(model, [[1]], max_new_tokens=3)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    (
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 5]], {}, r"prompt 0 has token id 5, which is not in \[0, 5\)"),
        (["a"], {}, "prompts given as text need a tokenizer"),
        ("abc", {}, "prompts must be a list of prompts"),
        (None, {}, "prompts must be a list of prompts, got None"),
        ([None], {}, "prompt 0 must be a text or a list of token ids, got None"),
        (torch.tensor([1, 2]), {}, r"prompt 0 must be a text or a list of token ids, got tensor"),
        (torch.tensor(1), {}, r"prompts must be a list of prompts, got tensor\(1\)"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0 .greedy. or positive, .*, got -1.0"),
        ([[1]], {"temperature": 2e6}, r"temperature must be .*, at most 1e\+06, got 2000000.0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be"),
        ([b"\1"], {}, r"prompt 0 must be a text or a list of token ids, got b'\\x01'"),
        ([[True]], {}, "prompt 0 has token id True"),
        ([[1]], {"top_k": -1}, "top_k must be None, 0 .* or a positive whole number, got -1"),
        ([[1]], {"top_k": 1.5}, "top_k must be None, 0 .* or a positive whole number, got 1.5"),
        ([[1]], {"seed": -1}, r"seed must be a whole number in \[0, 2\*\*63\), got -1"),
        ([[1]], {"seed": 2**63}, r"seed must be a whole number in .*, got 9223372036854775808"),
        ([[1]], {"seed": np.uint64(2**63)}, "seed must be a whole number in"),
        ([[1]], {"seed": [2**64]}, r"seed must be a whole number in .*, got 18446744073709551616"),
        ([[1], [2]], {"seed": np.array([0, -5])}, r"seed must be a whole number in .*-5"),
        ([[1]], {"seed": True}, r"seed must be one int or one per prompt \(1\), got True"),
        ([[1]], {"num_samples": True}, "num_samples must be a whole number from 1 to .*, got True"),
        ([[1]], {"stop": b"\1"}, r"stop must be .*, got b'\\x01'"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be"),
        ([[1]], {"overflow": "slide"}, "overflow must be 'recompute', 'stride:K'"),
        ([[1]], {"overflow": "stride:0"}, "overflow must be"),
        ([[1]], {"overflow": "stride:17"}, "overflow must be .* K from 1 to block_size"),
        ([[1]], {"seed": [1, 2]}, r"seed must be one int or one per prompt \(1\), got 2 seeds"),
        ([[1]], {"seed": [1.5]}, r"seed must be one int or one per prompt \(1\), got 1.5"),
        ([[1]], {"seed": torch.tensor(1.5)}, r"seed must be one int or .*, got tensor\(1.5"),
        ([[1]], {"stop": torch.tensor(1.5)}, r"stop must be .*, got tensor\(1.5"),
        ([[1]], {"stop": ["x"]}, "stop must be non-empty strings .with a tokenizer."),
        ([[1]], {"stop": [5]}, r"stop must be .* or token ids in \[0, 5\), got 5"),
        ([[1]], {"stop": 1.5}, "stop must be .* got 1.5"),
        ([1, 2], {}, "prompt 0 must be a text or a list of token ids, got 1"),
        ([[1.5]], {}, "prompt 0 has token id 1.5"),
        ([[1]], {"seed": 1.5}, r"seed must be one int or one per prompt \(1\), got 1.5"),
        ([[1]], {"temperature": "1"}, "temperature must be"),
        ([[1]], {"max_new_tokens": 2**63}, "max_new_tokens must be a whole number from 0 to"),
        ([[1]], {"dtype": "int3"}, r"dtype must be None or one of .*, got 'int3'"),
        ([[1]], {"top_p": 0.0}, r"top_p must be None or in \(0, 1\], got 0.0"),
        ([[1]], {"min_p": 1.5}, r"min_p must be None or in \[0, 1\], got 1.5"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty must be in .*, got 0"),
        ([[1]], {"num_samples": 0}, "num_samples must be a whole number from 1 to .*, got 0"),
        ([[1]], {"logprobs": -1}, "logprobs must be a whole number from 0 to .*, got -1"),
        ([[1]], {"max_batch": 0}, "max_batch must be a whole number from 1 to .*, got 0"),
    ),
)
def test_bad_input_is_one_sentence(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        gptfast.generate(make("course"), prompts, **options)
    assert "\n" not in str(error.value)
