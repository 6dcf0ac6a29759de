"""Generation: the cached engine against the uncached loop; windows, draws, stops, streams."""

import sys
from typing import Any

import pytest
import torch

import gptfast
from gptfast import GPT, BackendError, CharTokenizer, ConfigError, DataError, GPTConfig
from gptfast.sampling import Sampler

MODELS = {
    "course": GPTConfig(block_size=16, vocab_size=5, n_embd=32),
    "odd": GPTConfig(block_size=37, vocab_size=30, n_layer=3, n_embd=51, n_head=3, bias=False),
    "no attention": GPTConfig(block_size=8, vocab_size=9, n_embd=20, attention=False),
    "tanh, tied": GPTConfig(
        block_size=12, vocab_size=40, n_embd=48, n_head=4, gelu="tanh", tie_weights=True
    ),
}
TEXT = "the cat sat on the mat.\n"


def make(name: str) -> GPT:
    """A model that is sure enough of its tokens for rounding not to change them."""
    torch.manual_seed(0)
    model = GPT(MODELS[name])
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    return model


def prompts_for(config: GPTConfig) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = (1, 4, config.block_size, 3 * config.block_size + 1, 2)
    return [
        torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in lengths
    ]


@pytest.mark.parametrize("overflow", ("recompute", "stride:5", "stop"))
@pytest.mark.parametrize(
    "options",
    ({"temperature": 0.0}, {"top_k": 3, "seed": 7}, {"temperature": 0.7, "seed": [1, 2, 3, 4, 5]}),
)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_the_uncached_loop(name: str, options: dict[str, Any], overflow: str) -> None:
    model = make(name)
    prompts = prompts_for(model.config)
    model.backend = "fused"
    fused = gptfast.generate(model, prompts, max_new_tokens=50, overflow=overflow, **options)
    model.backend = "reference"
    plain = gptfast.generate(model, prompts, max_new_tokens=50, overflow=overflow, **options)
    for a, b in zip(fused, plain, strict=True):
        assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)


def test_greedy_is_the_loop_of_the_course() -> None:
    model = make("course").eval()
    idx = torch.tensor([[1, 2]])
    for _ in range(40):
        logits = model(idx[:, -16:])[:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    (result,) = gptfast.generate(model, [[1, 2]], max_new_tokens=40, temperature=0.0)
    assert result.tokens == idx[0, 2:].tolist()


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_a_prompt_has_the_bits_it_has_alone(isa: str, dtype: str) -> None:
    model = make("odd")
    prompts = prompts_for(model.config) * 3
    seeds = list(range(len(prompts)))
    together = gptfast.generate(model, prompts, max_new_tokens=45, seed=seeds, dtype=dtype)
    threads = torch.get_num_threads()
    for count, i in ((1, 0), (2, 3), (1, 7), (2, 14)):
        torch.set_num_threads(count)
        (alone,) = gptfast.generate(model, [prompts[i]], max_new_tokens=45, seed=[i], dtype=dtype)
        assert alone == together[i]  # the log-probabilities too
    torch.set_num_threads(threads)


def test_more_prompts_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("course")
    prompts = [[1 + i % 4] * (1 + i % 9) for i in range(30)]
    whole = gptfast.generate(model, prompts, max_new_tokens=12, seed=5)
    monkeypatch.setattr(sys.modules["gptfast.generation"], "ROWS_AT_ONCE", 7)
    assert gptfast.generate(model, prompts, max_new_tokens=12, seed=5) == whole


def test_seed_decides_the_draws() -> None:
    model = make("odd")
    first, second, other = (
        gptfast.generate(model, [[1]], max_new_tokens=30, seed=seed)[0].tokens for seed in (1, 1, 2)
    )
    assert first == second != other
    twins = gptfast.generate(model, [[1], [1]], max_new_tokens=30, seed=1)
    assert twins[0].tokens == first != twins[1].tokens


@pytest.mark.parametrize(("temperature", "top_k"), ((1.0, None), (0.5, None), (2.0, 3)))
def test_draws_follow_the_distribution(temperature: float, top_k: int | None) -> None:
    n = 20_000
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.9, -0.2, 1.1]])
    sampler = Sampler(n, temperature=temperature, top_k=top_k, seed=11)
    drawn = sampler(logits.expand(n, -1), torch.arange(n), step=4)
    scaled = logits[0].double() / temperature
    if top_k is not None:
        scaled = scaled.where(scaled >= scaled.topk(top_k).values[-1], torch.tensor(-torch.inf))
    expected = scaled.softmax(-1) * n
    observed = torch.bincount(drawn, minlength=6).double()
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < 22.0  # 5 degrees of freedom exceed it once in 2,000


def test_options_of_zero_tokens_and_no_prompts() -> None:
    model = make("course")
    assert gptfast.generate(model, []) == []
    (result,) = gptfast.generate(model, [[1]], max_new_tokens=0)
    assert result.tokens == [] and result.finish_reason == "length"


def text_model() -> tuple[GPT, CharTokenizer]:
    tokenizer = CharTokenizer.from_text(TEXT)
    torch.manual_seed(3)
    return GPT(GPTConfig(block_size=10, vocab_size=tokenizer.vocab_size, n_embd=32)), tokenizer


def test_text_in_text_out() -> None:
    model, tokenizer = text_model()
    (a,) = gptfast.generate(model, ["the c"], tokenizer=tokenizer, max_new_tokens=30)
    (b,) = gptfast.generate(model, [tokenizer.encode("the c")], max_new_tokens=30)
    assert a.tokens == b.tokens and a.text == tokenizer.decode(a.tokens) and b.text is None


@pytest.mark.parametrize("length", (1, 2, 3))
def test_stop_ends_the_text_before_itself(length: int) -> None:
    model, tokenizer = text_model()
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 60, "seed": 2}
    (free,) = gptfast.generate(model, ["the"], **options)
    assert free.text is not None
    stop = free.text[20 : 20 + length]
    end = free.text.index(stop)
    (stopped,) = gptfast.generate(model, ["the"], stop=["never there", stop], **options)
    assert stopped.text == free.text[:end] and stopped.finish_reason == "stop"
    assert tokenizer.decode(stopped.tokens) == stopped.text
    assert len(stopped.logprobs) == len(stopped.tokens)
    streamed = "".join(map(str, gptfast.stream(model, "the", stop=stop, **options)))
    assert streamed == stopped.text


def test_stop_token() -> None:
    model = make("odd")
    (free,) = gptfast.generate(model, [[1]], max_new_tokens=40, seed=1)
    stop = free.tokens[10]
    (stopped,) = gptfast.generate(model, [[1]], max_new_tokens=40, seed=1, stop=stop)
    assert stopped.tokens == free.tokens[: free.tokens.index(stop)]
    assert stopped.finish_reason == "stop"


def test_one_stop_does_not_end_the_others() -> None:
    model = make("odd")
    free = gptfast.generate(model, [[1], [2], [3]], max_new_tokens=40, seed=1)
    stop = free[0].tokens[5]
    stopped = gptfast.generate(model, [[1], [2], [3]], max_new_tokens=40, seed=1, stop=[stop])
    for a, b in zip(stopped, free, strict=True):
        end = b.tokens.index(stop) if stop in b.tokens else len(b.tokens)
        assert a.tokens == b.tokens[:end]


def test_stream_gives_what_generate_gives() -> None:
    model, tokenizer = text_model()
    (whole,) = gptfast.generate(model, ["a "], tokenizer=tokenizer, max_new_tokens=25, seed=9)
    pieces = list(gptfast.stream(model, "a ", tokenizer=tokenizer, max_new_tokens=25, seed=9))
    assert "".join(map(str, pieces)) == whole.text and len(pieces) > 20
    tokens = [t for piece in gptfast.stream(model, [1, 2], max_new_tokens=25) for t in piece]
    assert tokens == gptfast.generate(model, [[1, 2]], max_new_tokens=25)[0].tokens


def test_overflow_rules() -> None:
    model = make("course")
    with pytest.raises(DataError, match="prompt 1 has 14 tokens and needs a window of 17"):
        gptfast.generate(model, [[1], [1] * 14], max_new_tokens=4, overflow="error")
    (fits,) = gptfast.generate(model, [[1] * 14], max_new_tokens=3, overflow="error")
    assert len(fits.tokens) == 3
    (ended,) = gptfast.generate(model, [[1] * 14], max_new_tokens=20, overflow="stop")
    assert len(ended.tokens) == 3 and ended.finish_reason == "window"


def test_stride_keeps_the_last_tokens_of_the_window() -> None:
    model = make("course").eval()
    tokens = [1, 2, 3]
    (result,) = gptfast.generate(
        model, [tokens], max_new_tokens=40, temperature=0, overflow="stride:5"
    )
    start = 0
    for _ in range(40):
        while len(tokens) - start > 16:
            start += 5
        logits = model(torch.tensor([tokens[start:]]))[0, -1]
        tokens = [*tokens, int(logits.argmax())]
    assert result.tokens == tokens[3:]


def test_model_in_bfloat16_and_training_mode() -> None:
    model = make("odd").bfloat16().train()
    (a,) = gptfast.generate(model, [[1, 2]], max_new_tokens=20, temperature=0)
    (b,) = gptfast.generate(model.eval(), [[1, 2]], max_new_tokens=20, temperature=0)
    assert a == b
    assert model.train().training


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
        ([[1]], {"temperature": -1.0}, "temperature must be 0 .greedy. or positive, got -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be"),
        ([[1]], {"top_k": 0}, "top_k must be None or a positive whole number, got 0"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be"),
        ([[1]], {"overflow": "slide"}, "overflow must be 'recompute', 'stride:K'"),
        ([[1]], {"overflow": "stride:0"}, "overflow must be"),
        ([[1]], {"seed": [1, 2]}, r"seed must be one int or one per prompt \(1\), got 2"),
        ([[1]], {"stop": ["x"]}, "stop must be non-empty strings .with a tokenizer."),
        ([[1]], {"dtype": "int3"}, r"dtype must be None or one of \['bf16', 'fp32'\], got 'int3'"),
    ),
)
def test_bad_input_is_one_sentence(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        gptfast.generate(make("course"), prompts, **options)
    assert "\n" not in str(error.value)


def test_stream_checks_at_the_call() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        gptfast.stream(make("course"), [1], temperature=-1)
    with pytest.raises(TypeError, match="has no option 'beams'; it has max_new_tokens"):
        gptfast.stream(make("course"), [1], beams=2)
