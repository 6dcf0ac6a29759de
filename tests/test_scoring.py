"""Scores: log-probabilities of given texts, against the model's own forward pass."""

import math
from typing import Any

import pytest
import torch
from test_generation import TEXT, make, prompts_for, text_model

import gptfast
from gptfast import ConfigError, DataError


def test_scores_are_the_log_probabilities_of_the_forward_pass(isa: str) -> None:
    model = make("odd").eval()
    texts = [p for p in prompts_for(model.config) if len(p) <= model.config.block_size]
    for text, result in zip(texts, gptfast.score(model, texts), strict=True):
        logits = model(torch.tensor([text]))[0].log_softmax(-1)
        expected = [logits[t, token].item() for t, token in enumerate(text[1:])]
        assert result.logprobs == pytest.approx(expected, abs=1e-5)
        assert result.tokens == text and result.characters is None
        assert result.logprob == pytest.approx(sum(expected), abs=1e-4)


@pytest.mark.parametrize("dtype", (None, "bf16", "int8"))
def test_generated_tokens_have_the_scores_that_generate_gave(dtype: str | None) -> None:
    model = make("odd")
    prompts = [[1, 2, 3], [4]]
    results = gptfast.generate(model, prompts, max_new_tokens=20, dtype=dtype)
    texts = [prompt + result.tokens for prompt, result in zip(prompts, results, strict=True)]
    for result, scored in zip(results, gptfast.score(model, texts, dtype=dtype), strict=True):
        assert scored.logprobs[-20:] == pytest.approx(result.logprobs, abs=1e-6)


@pytest.mark.parametrize("stride", (None, 1, 5, 37, 100))
@pytest.mark.parametrize("backend", ("fused", "reference"))
def test_long_texts_move_the_window(backend: Any, stride: int | None) -> None:
    model = make("odd").eval()
    model.backend = backend
    T, text = model.config.block_size, prompts_for(model.config)[3]
    (result,) = gptfast.score(model, [text], stride=stride)
    assert len(result.logprobs) == len(text) - 1
    step, expected, model.backend = min(T, stride or T // 2), [], "reference"
    last = min(T, len(text) - 1)
    while len(expected) < len(text) - 1:
        first = max(0, last - T)
        logits = model(torch.tensor([text[first:last]]))[0].log_softmax(-1)
        for t in range(len(expected), last):
            expected.append(logits[t - first, text[t + 1]].item())
        last = min(len(text) - 1, last + step)
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_a_text_has_the_bits_it_has_alone(isa: str, dtype: str, any_threads: None) -> None:
    model = make("odd")
    texts = prompts_for(model.config) * 2
    together = gptfast.score(model, texts, dtype=dtype)
    for count, i in ((1, 1), (2, 3), (1, 7)):
        torch.set_num_threads(count)
        assert gptfast.score(model, [texts[i]], dtype=dtype) == [together[i]]


def test_bits_per_character() -> None:
    model, tokenizer = text_model()
    one, other = gptfast.score(model, [TEXT, "a"], tokenizer=tokenizer)
    assert one.characters == len(TEXT) - 1
    assert one.bits_per_character == pytest.approx(-one.logprob / math.log(2) / (len(TEXT) - 1))
    assert one.bits_per_token == one.bits_per_character
    assert other.logprobs == [] and math.isnan(other.bits_per_character)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    (
        ([[1], []], {}, "text 1 is empty"),
        ([[30]], {}, r"text 0 has token id 30, which is not in \[0, 30\)"),
        (["a"], {}, "texts given as text need a tokenizer"),
        ("abc", {}, "texts must be a list of texts"),
        ([[1]], {"stride": 0}, "stride must be a whole number from 1 to .*, got 0"),
        ([[1]], {"dtype": "int3"}, "dtype must be None or one of"),
    ),
)
def test_bad_input_is_one_sentence(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        gptfast.score(make("odd"), texts, **options)
    assert "\n" not in str(error.value)
