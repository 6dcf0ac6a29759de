"""Generation: the cached engine against the uncached loop, in any batch, window and step."""

from typing import Any

import pytest
import torch
from generating import MODELS, WIDE, interrupted_soon, make, prompts_for
from hypothesis import given, settings
from hypothesis import strategies as st

import gptfast
from gptfast import GPT, CharTokenizer, ConfigError, DataError, GPTConfig
from gptfast.generation import make_request
from gptfast.generation.request import Request
from gptfast.ops import select
from gptfast.ops.sampling import choose, draws


@pytest.mark.parametrize("overflow", ("recompute", "stride:5", "stop"))
@pytest.mark.parametrize(
    "options",
    (
        {"temperature": 0.0},
        {"top_k": 3, "seed": 7},
        {"temperature": 0.7, "seed": [1, 2, 3, 4, 5]},
        {"top_p": 0.8, "repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 1.4, "min_p": 0.1, "top_k": 9, "num_samples": 2, "stop": [2]},
        {"temperature": 0.0, "repetition_penalty": 2.0},
    ),
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
        assert [[t for t, _ in row] for row in a.top_logprobs] == [
            [t for t, _ in row] for row in b.top_logprobs
        ]


def test_greedy_is_the_loop_of_the_course() -> None:
    model = make("course").eval()
    idx = torch.tensor([[1, 2]])
    for _ in range(40):
        logits = model(idx[:, -16:])[:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    (result,) = gptfast.generate(model, [[1, 2]], max_new_tokens=40, temperature=0.0)
    assert result.tokens == idx[0, 2:].tolist()


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_a_prompt_has_the_bits_it_has_alone(isa: str, dtype: str) -> None:
    model = make("odd")
    prompts = prompts_for(model.config) * 3
    seeds = list(range(len(prompts)))
    together = gptfast.generate(model, prompts, max_new_tokens=45, seed=seeds, dtype=dtype)
    for count, i in ((1, 0), (2, 3), (1, 7), (2, 14)):
        torch.set_num_threads(count)
        (alone,) = gptfast.generate(model, [prompts[i]], max_new_tokens=45, seed=[i], dtype=dtype)
        assert alone == together[i]  # the log-probabilities too


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_bits_of_sums_longer_than_a_block(isa: str, dtype: str) -> None:
    """The model's products sum over 640 and 2560 values, in blocks of at most 768."""
    torch.manual_seed(0)
    model = gptfast.pack(GPT(WIDE), dtype)
    prompts = [torch.randint(1, 70, (1 + i % 9,)).tolist() for i in range(64)]
    together = gptfast.generate(model, prompts, max_new_tokens=6, seed=[*range(64)])
    for count in (1, 2):
        torch.set_num_threads(count)
        for first, batch in ((0, 1), (17, 1), (63, 1), (5, 2), (62, 2), (0, 7), (31, 7)):
            rows = slice(first, first + batch)
            seed = [*range(64)][rows]
            part = gptfast.generate(model, prompts[rows], max_new_tokens=6, seed=seed)
            assert part == together[rows]  # the log-probabilities too


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
@pytest.mark.parametrize("name", ("odd", "course"))
def test_memory_does_not_change_the_bits(isa: str, name: str, dtype: str) -> None:
    model = make(name)
    options: dict[str, Any] = {"max_new_tokens": 30, "seed": 5, "dtype": dtype, "num_samples": 2}
    prompts = prompts_for(model.config) + [[1, 2, 3]] * 3
    whole = gptfast.generate(model, prompts, **options)
    for memory in ({"max_batch": 1}, {"max_batch": 7}, {"max_cache_bytes": 300_000}):
        assert gptfast.generate(model, prompts, **memory, **options) == whole


def test_ten_thousand_prompts_come_in_order() -> None:
    model = make("course")
    prompts = [[1 + i % 4] * (1 + i % 9) for i in range(10_000)]
    results = gptfast.generate(model, prompts, max_new_tokens=3, seed=[0] * len(prompts))
    assert len(results) == len(prompts)
    assert results[:36] * 277 == results[: 36 * 277]  # every 36th prompt is the same


def test_prompts_may_be_read_once() -> None:
    model, tokenizer = make("course"), CharTokenizer("abcd")
    texts, options = ["ab", "cd"], {"max_new_tokens": 3, "temperature": 0.0}
    expected = gptfast.generate(model, texts, tokenizer=tokenizer, **options)
    assert gptfast.generate(model, iter(texts), tokenizer=tokenizer, **options) == expected
    ids = [tokenizer.encode(text) for text in texts]
    found = gptfast.generate(model, iter(ids), **options)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert len(gptfast.score(model, map(str.strip, texts), tokenizer=tokenizer)) == 2


def test_a_generation_of_no_tokens_has_lists_of_its_own() -> None:
    model = make("course")
    model.backend = "reference"
    (found,) = gptfast.generate(model, [[1]], max_new_tokens=0)
    assert found.tokens == found.logprobs == [] and found.tokens is not found.logprobs


def test_samples_share_the_prompt_and_differ() -> None:
    model = make("odd")
    prompts = [[1, 2, 3, 4], [5], [6] * 60]
    samples = gptfast.generate(model, prompts, num_samples=3, max_new_tokens=20, seed=[3, 4, 5])
    assert len(samples) == 9 and samples[0] != samples[1] != samples[2]
    singles = gptfast.generate(model, prompts, max_new_tokens=20, seed=[3, 4, 5])
    assert samples[::3] == singles  # the first sample of each prompt
    together = gptfast.generate(model, prompts, num_samples=3, max_new_tokens=20, seed=8)
    alone = gptfast.generate(
        model, [p for p in prompts for _ in range(3)], max_new_tokens=20, seed=8
    )
    assert together == alone


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_interrupt_returns_what_there_is(backend: Any) -> None:
    model = make("course")
    model.backend = backend
    results = interrupted_soon(
        lambda: gptfast.generate(model, [[1], [2], [3]], max_new_tokens=10**6, max_batch=2), 0.3
    )
    assert [each.finish_reason for each in results] == ["interrupted"] * 3
    assert results[0].tokens and bool(results[2].tokens) == (backend == "reference")
    (whole,) = gptfast.generate(model, [[1]], max_new_tokens=10)
    first = results[0].tokens[:10]
    assert first == whole.tokens[: len(first)]


@pytest.mark.parametrize("dtype", (None, "bf16", "int8"))
def test_a_packed_model_is_the_model_as_it_was(dtype: str | None) -> None:
    model = make("odd")
    before = gptfast.generate(model, [[1, 2]], dtype=dtype)
    packed = gptfast.pack(model, dtype)
    for param in model.parameters():
        param.data.zero_()
    assert gptfast.generate(packed, [[1, 2]]) == before
    assert gptfast.generate(packed, [[1, 2]], dtype=dtype) == before
    assert [*gptfast.stream(packed, [[1, 2]], max_new_tokens=3)]
    other = "int8" if dtype != "int8" else "fp32"
    with pytest.raises(ConfigError, match=f"dtype must be the packed model's, .*, got '{other}'"):
        gptfast.generate(packed, [[1]], dtype=other)


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
def test_a_model_in_a_dtype_that_the_engine_lacks(dtype: str) -> None:
    model, options = make("course"), {"max_new_tokens": 5, "dtype": dtype}
    expected = gptfast.generate(model, [[1, 2]], **options)
    for own in (torch.float64, torch.float16):
        other = model.to(own)
        results = gptfast.generate(other, [[1, 2]], **options)
        assert gptfast.generate(gptfast.pack(other, dtype), [[1, 2]], max_new_tokens=5) == results
        assert own == torch.float16 or results == expected
        with pytest.raises(ConfigError, match=f"dtype must be one of .* in {own}, got None"):
            gptfast.PackedModel(other, None)


def nearly_chosen(model: GPT, request: Request, i: int, generated: list[int], token: int) -> bool:
    """Whether the reference could choose this token next if it rounded differently."""
    text = request.prompts[i] + generated
    stride = request.stride or 1
    start = -(-max(0, len(text) - model.config.block_size) // stride) * stride
    logits = model(torch.tensor([text[start:]]))[0, -1].detach().expand(64, -1)
    noise = torch.Generator().manual_seed(0)
    logits = logits + 1e-5 * torch.randn(logits.shape, generator=noise)
    seed, sequence_id, step = request.seeds[i], request.sequence_ids[i], len(generated)
    uniforms = draws(*(torch.full((64,), each) for each in (seed, sequence_id, step)))
    uniforms += 1e-5 * torch.randn(64, generator=noise).double()
    chosen = choose(request.sampling, logits, [text] * 64, uniforms.clamp(0, 1 - 1e-9))
    return token in chosen.tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_configuration_equals_the_uncached_loop(data: st.DataObject) -> None:
    draw = data.draw
    head_dim, n_head = draw(st.integers(1, 33)), draw(st.integers(1, 3))
    config = GPTConfig(
        block_size=draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(1, 50)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=head_dim * n_head,
        bias=draw(st.booleans()),
        attention=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = GPT(config).eval()
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in lengths]
    strides = st.integers(1, config.block_size).map(lambda n: f"stride:{n}")
    options: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(0, 30)),
        "overflow": draw(st.sampled_from(("recompute", "stop")) | strides),
        "temperature": draw(st.sampled_from((0.0, 0.5, 1.0, 2.0))),
        "top_k": draw(st.none() | st.integers(1, 60)),
        "repetition_penalty": draw(st.sampled_from((1.0, 0.6, 1.7))),
        "num_samples": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**62)),
        "max_batch": draw(st.integers(1, 8)),
    }
    if select.extension() is not None:  # memory for at least as many sequences
        row = gptfast.pack(model).compiled.cache_bytes(config.block_size)
        options["max_cache_bytes"] = row * draw(st.sampled_from((1, 2, 5, 1000)))
    request = make_request(model, prompts, **options)
    fused = gptfast.generate(model, prompts, **options)
    model.backend = "reference"
    plain = gptfast.generate(model, prompts, **options)
    # If a row's values are nearly equal, a norm amplifies rounding by up to 1 / sqrt(eps) = 316.
    tolerance = 1e-4 if config.n_embd > 2 else 1e-3
    for i, (a, b) in enumerate(zip(fused, plain, strict=True)):
        assert a.finish_reason == b.finish_reason and len(a.tokens) == len(b.tokens)
        same = 0
        while same < len(a.tokens) and a.tokens[same] == b.tokens[same]:
            same += 1
        assert a.logprobs[:same] == pytest.approx(b.logprobs[:same], abs=tolerance)
        if same < len(a.tokens):
            assert nearly_chosen(model, request, i, b.tokens[:same], a.tokens[same])


@pytest.mark.skipif(select.extension() is None, reason="the engine is compiled")
@pytest.mark.parametrize(
    "options",
    (
        {"logprobs": 2, "max_batch": 2},
        {"stop": [2], "num_samples": 2, "seed": 3},
        {"overflow": "stride:5", "repetition_penalty": 1.2},
        {"overflow": "stop"},
    ),
)
@pytest.mark.parametrize("name", ("course", "no attention"))
def test_the_steps_of_a_call_do_not_change_the_bits(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    model = gptfast.pack(make(name))
    prompts = prompts_for(model.config)
    whole = gptfast.generate(model, prompts, max_new_tokens=50, **options)
    for name in ("INTERRUPT_SECONDS", "STREAM_SECONDS"):
        monkeypatch.setattr(f"gptfast.generation.api.{name}", 0.0)  # one step per call
    assert gptfast.generate(model, prompts, max_new_tokens=50, **options) == whole
    streamed: list[list[int]] = [[] for _ in whole]
    for i, piece in gptfast.stream(model, prompts, max_new_tokens=50, **options):
        streamed[i] += piece
    assert streamed == [each.tokens for each in whole]


def test_options_of_zero_tokens_and_no_prompts() -> None:
    model = make("course")
    assert gptfast.generate(model, []) == []
    (result,) = gptfast.generate(model, [[1]], max_new_tokens=0)
    assert result.tokens == [] and result.finish_reason == "length"


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
