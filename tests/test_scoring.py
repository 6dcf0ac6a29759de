"""Scores: log-probabilities of given texts, against the model's own forward pass."""

import copy
import math
from typing import Any

import pytest
import torch
from generating import TEXT, WIDE, make, prompts_for, text_model
from peers import SdpaGPT

import gptfast
from gptfast import GPT, BackendError, ConfigError, DataError, TrainConfig, Trainer, data
from gptfast.generation.snapshot import snapshot
from gptfast.testing import RESULT_FACTOR, assert_budget


def test_scores_are_the_log_probabilities_of_the_forward_pass(isa: str) -> None:
    model = make("odd").eval()
    texts = [p for p in prompts_for(model.config) if len(p) <= model.config.block_size]
    for text, result in zip(texts, gptfast.score(model, texts), strict=True):
        logits = model(torch.tensor([text]))[0].log_softmax(-1)
        expected = [logits[t, token].item() for t, token in enumerate(text[1:])]
        assert result.logprobs == pytest.approx(expected, abs=1e-5)
        assert result.tokens == text and result.characters is None
        assert result.logprob == pytest.approx(sum(expected), abs=1e-4)


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
@pytest.mark.parametrize("name", ("odd", "course", "wide"))
def test_the_engine_keeps_to_the_budget(isa: str, name: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = (GPT(WIDE) if name == "wide" else make(name)).eval()
    config = model.config
    texts = torch.randint(1, config.vocab_size, (6, config.block_size + 1))
    rounded = snapshot(model, dtype)  # to the values that quantized weights represent

    def logprobs(module: torch.nn.Module) -> torch.Tensor:
        logits = module(texts[:, :-1]).detach()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return wide.gather(-1, texts[:, 1:, None])[..., 0]

    own = SdpaGPT(config).eval()
    own.load_state_dict(rounded.state_dict())
    own = own.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    packed = gptfast.pack(model, dtype)
    actual = torch.tensor([each.logprobs for each in gptfast.score(packed, texts.tolist())])
    # 8-bit weights with activations of at least 16 bits have much smaller errors than bfloat16.
    few_bits = dtype != "int8" or packed.dtype == torch.bfloat16
    oracle = logprobs(copy.deepcopy(rounded).double())
    factor = RESULT_FACTOR if few_bits else 0.05
    assert_budget("log-probabilities", actual, logprobs(own), oracle, factor)


@pytest.mark.parametrize("name", ("odd", "wide"))
def test_scores_of_attention_may_be_large(isa: str, name: str) -> None:
    torch.manual_seed(0)
    model = (GPT(WIDE) if name == "wide" else make(name)).eval()
    C = model.config.n_embd
    for block in model.h:
        block.attn.c_attn.weight.data[: 2 * C] *= 3e5  # queries and keys
    texts = torch.randint(1, model.config.vocab_size, (3, model.config.block_size + 1))
    oracle = copy.deepcopy(model).double()(texts[:, :-1]).log_softmax(-1)
    expected = oracle.gather(-1, texts[:, 1:, None])[..., 0]
    actual = torch.tensor([each.logprobs for each in gptfast.score(model, texts.tolist())])
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)


def test_weights_of_8_bits_change_a_trained_models_loss_little() -> None:
    torch.manual_seed(0)
    text = data.abc_corpus()[:20_000]
    tokenizer = gptfast.CharTokenizer.from_text(text)
    config = gptfast.GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_embd=64)
    model = GPT(config)
    trainer = Trainer(model, TrainConfig(lr=3e-3))
    windows = torch.tensor(tokenizer.encode(text)).unfold(0, 17, 1)
    for _ in range(100):
        batch = windows[torch.randint(15_000, (64,))]
        trainer.step(batch[:, :-1], batch[:, 1:])
    held_out = windows[15_100::17].tolist()
    losses = [
        -sum(each.logprob for each in gptfast.score(model, held_out, dtype=dtype))
        for dtype in ("fp32", "int8")
    ]
    assert losses[0] / len(held_out) / 16 < 0.8  # below ln 4 = 1.39 nats: it has learnt
    assert losses[1] == pytest.approx(losses[0], rel=0.005) and losses[1] != losses[0]


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_generated_tokens_have_the_scores_that_generate_gave(isa: str, dtype: str) -> None:
    model = make("odd")
    prompts = [[1, 2, 3], [4]]
    results = gptfast.generate(model, prompts, max_new_tokens=20, dtype=dtype)
    texts = [prompt + result.tokens for prompt, result in zip(prompts, results, strict=True)]
    for result, scored in zip(results, gptfast.score(model, texts, dtype=dtype), strict=True):
        assert scored.logprobs[-20:] == result.logprobs  # bitwise equal


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
def test_a_text_has_the_bits_it_has_alone(isa: str, dtype: str) -> None:
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
    assert other.logprobs == [] and other.logprob == 0.0
    assert other.bits_per_character is None and other.bits_per_token is None
    (ids,) = gptfast.score(model, [[1, 2]])  # what they write is not known
    assert ids.bits_per_character is None
    assert ids.bits_per_token == pytest.approx(-ids.logprob / math.log(2))


@pytest.mark.parametrize("dtype", (None, "bf16", "int8"))
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_logits_that_are_not_finite_name_the_text(backend: Any, dtype: str | None) -> None:
    model = make("odd")
    model.backend = backend
    model.wte.weight.data[2] = torch.nan  # what reads this token gives no numbers
    with pytest.raises(DataError, match="the model's logits are not finite for text 1"):
        gptfast.score(model, [[1, 3], [4, 2, 1], [1, 2]], dtype=dtype)
    assert len(gptfast.score(model, [[1, 3], [1, 2]], dtype=dtype)) == 2  # 2 is not read


def test_an_error_names_score() -> None:
    model = make("odd").double()
    model.backend = "fused"
    with pytest.raises(BackendError, match="score: the fused kernels cannot run: .* not float64"):
        gptfast.score(model, [[1, 2]])


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
