"""Generation: the cached engine against the uncached loop; windows, draws, stops, streams."""

import mmap
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generating import MODELS, WIDE, interrupted_soon, make, prompts_for, text_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gptfast
from gptfast import GPT, BackendError, CharTokenizer, ConfigError, DataError, Generation, GPTConfig
from gptfast.generation import make_request
from gptfast.generation.engine import Engine
from gptfast.generation.request import Request
from gptfast.ops import select
from gptfast.ops.sampling import Sampling, choose, draws, probabilities


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


def test_one_text_that_needs_more_cache_than_there_may_be() -> None:
    model = make("odd")
    with pytest.raises(ConfigError, match=r"max_cache_bytes must hold one sequence of 37 tokens"):
        gptfast.generate(model, [[1]], max_cache_bytes=1000)
    assert len(gptfast.generate(model, [[1]], max_cache_bytes=1_000_000)[0].tokens) == 100


@pytest.mark.parametrize("overflow", ("recompute", "stop"))
@pytest.mark.parametrize("budget", (200_000, 1_000_000, 30_000_000))
def test_the_cache_stays_within_its_budget(budget: int, overflow: str) -> None:
    packed = gptfast.pack(make("odd"))
    options: dict[str, Any] = {"max_cache_bytes": budget, "overflow": overflow}
    request = make_request(packed, [[1, 2, 3]] * 300, max_new_tokens=50, **options)
    assert (
        0.6 * min(budget, 256 * packed.compiled.cache_bytes(37))
        < Engine(packed, request).cache_bytes
    )
    assert Engine(packed, request).cache_bytes <= budget


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_budget_and_what_the_texts_take() -> None:
    """Runs in a separate process, so that nothing else has raised the peak."""
    program = """
        from pathlib import Path
        import gptfast
        def kib(name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name))
        def generate(prompts, budget):
            gptfast.generate(packed, prompts, max_new_tokens=60, max_cache_bytes=budget)
        config = gptfast.GPTConfig(block_size=64, vocab_size=66, n_layer=2, n_head=2, n_embd=128)
        packed = gptfast.pack(gptfast.GPT(config))
        generate([[1], [2]], 1 << 20)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = kib("VmRSS")
        generate([[1 + i % 60] for i in range(2000)], 16 << 20)
        print(kib("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    # A token takes 24 bytes in the engine and some 100 in the result; a pass needs activations of
    # 128 rows.
    assert 16 < int(done.stdout) / 1024 < 16 + 2000 * 61 * 124 / 2**20 + 12


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


def test_what_cannot_be_packed() -> None:
    model = make("course")
    with pytest.raises(ConfigError, match="dtype must be None or one of"):
        gptfast.pack(model, "int3")
    with pytest.raises(BackendError, match="pack: the fused kernels cannot run: .*not float64"):
        gptfast.pack(model.double())
    model.backend = "reference"
    with pytest.raises(BackendError, match="pack: the model's backend is 'reference'"):
        gptfast.pack(model)


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


def test_two_threads_generate_at_once() -> None:
    model = make("odd")
    expected = [gptfast.generate(model, [[i]], max_new_tokens=200) for i in (1, 2)]
    results: dict[int, list[Generation]] = {}

    def work(i: int) -> None:
        results[i] = gptfast.generate(model, [[i]], max_new_tokens=200)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[1], results[2]] == expected


@pytest.mark.skipif(select.extension() is None, reason="the engine is compiled")
def test_other_python_threads_run_meanwhile() -> None:
    model, ticks, done = make("odd"), 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    gptfast.generate(model, [[1]] * 64, max_new_tokens=300)
    seconds = time.perf_counter() - start
    done.set()
    ticker.join()
    assert ticks > 100 * seconds  # of 1,000 a second; 10 if the call held the GIL


def test_seed_decides_the_draws() -> None:
    model = make("odd")
    first, second, other = (
        gptfast.generate(model, [[1]], max_new_tokens=30, seed=seed)[0].tokens for seed in (1, 1, 2)
    )
    assert first == second != other
    twins = gptfast.generate(model, [[1], [1]], max_new_tokens=30, seed=1)
    assert twins[0].tokens == first != twins[1].tokens


LOGITS = [0.3, -1.0, 2.0, 0.9, -0.2, 1.1]
FILTERS = (
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.75},
    {"min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.7},
)


def constant_model(logits: list[float]) -> GPT:
    """Makes a model that returns these logits for any input."""
    V = len(logits)
    model = GPT(GPTConfig(block_size=2, vocab_size=V, n_embd=8, n_layer=1, n_head=1))
    for param in model.parameters():
        param.data.zero_()
    model.ln_f.bias.data[0] = 1.0
    model.lm_head.weight.data[:, 0] = torch.tensor(logits)
    return model


def chi_square(observed: Tensor, expected: Tensor) -> float:
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    return ((observed - expected)[possible] ** 2 / expected[possible]).sum().item()


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_draws_follow_the_distribution(isa: str, backend: Any, options: dict[str, Any]) -> None:
    n = 20_000
    model = constant_model(LOGITS)
    model.backend = backend
    prompt = [2, 4]  # the tokens that the penalty applies to
    results = gptfast.generate(
        model, [prompt], num_samples=n, max_new_tokens=1, seed=11, max_batch=4096, **options
    )
    observed = torch.bincount(torch.tensor([r.tokens[0] for r in results]), minlength=6).double()
    scores = torch.tensor([LOGITS], dtype=torch.float64)
    penalty = options.get("repetition_penalty", 1.0)
    for token in prompt:
        scores[0, token] *= penalty if scores[0, token] < 0 else 1 / penalty
    weights = probabilities(Sampling(**options), scores)[0]
    # chi-square with 5 degrees of freedom exceeds 22 once in 2,000
    assert chi_square(observed, weights / weights.sum() * n) < 22.0


def test_filters_by_hand() -> None:
    p = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]], dtype=torch.float64)

    def kept(**options: Any) -> list[int]:
        return probabilities(Sampling(**options), p.log())[0].nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.7) == [1, 3] and kept(top_p=0.71) == [1, 3, 4]
    assert kept(min_p=0.3) == [1, 3, 4] and kept(min_p=1.0) == [1]
    assert kept(top_k=4, top_p=0.95, min_p=0.26) == [1, 3, 4]
    ties = torch.tensor([[0.2, 0.2, 0.2, 0.4]], dtype=torch.float64)
    assert (probabilities(Sampling(top_k=2), ties.log()) > 0).all()
    assert (probabilities(Sampling(top_p=0.5), ties.log()) > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    V=st.integers(1, 300),
    seed=st.integers(0, 2**62),
    scale=st.sampled_from((0.0, 0.1, 3.0, 50.0)),
    temperature=st.sampled_from((0.0, 1e-5, 0.3, 1.0, 3.0)),
    top_k=st.none() | st.integers(1, 320),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    penalty=st.sampled_from((1.0, 0.5, 2.0)),
)
def test_engine_draws_what_the_reference_draws(
    V: int, seed: int, scale: float, temperature: float, top_k: int | None, top_p: float | None,
    min_p: float | None, penalty: float,
) -> None:  # fmt: skip
    logits = scale * torch.randn(V, generator=torch.Generator().manual_seed(seed))
    model, n = constant_model(logits.tolist()), 40
    options: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": penalty,
    }  # fmt: skip
    prompt = [V - 1]
    results = gptfast.generate(
        model, [prompt], num_samples=n, max_new_tokens=1, seed=seed, **options
    )
    drawn = torch.tensor([r.tokens[0] for r in results])
    keys, zero = torch.full((n,), seed), torch.zeros(n, dtype=torch.int64)
    uniforms = draws(keys, torch.arange(n), zero)
    rows = logits.expand(n, -1)
    expected = choose(Sampling(**options), rows, [prompt] * n, uniforms)
    # Backends round sums differently, and a draw or threshold may lie between the two results.
    nearby = [
        choose(Sampling(**options), rows, [prompt] * n, (uniforms + d).clamp(0, 1 - 1e-9))
        for d in (-1e-5, 1e-5)
    ]
    equal = (drawn == expected) | (drawn == nearby[0]) | (drawn == nearby[1])
    if top_p is not None and not equal.all():
        wider = [Sampling(**(options | {"top_p": min(1.0, top_p + d)})) for d in (-1e-5, 1e-5)]
        for how in wider:
            equal |= drawn == choose(how, rows, [prompt] * n, uniforms)
    assert equal.all()


def test_top_logprobs_are_of_the_likeliest_tokens() -> None:
    model = constant_model(LOGITS)
    (result,) = gptfast.generate(model, [[1]], max_new_tokens=2, logprobs=3, top_k=1)
    logprobs = torch.tensor(LOGITS).log_softmax(-1)
    for row in result.top_logprobs:
        assert [token for token, _ in row] == [2, 5, 3]
        assert torch.allclose(torch.tensor([value for _, value in row]), logprobs[[2, 5, 3]])
    assert result.tokens == [2, 2]
    (all_of_them,) = gptfast.generate(model, [[1]], max_new_tokens=1, logprobs=100)
    assert len(all_of_them.top_logprobs[0]) == 6


def test_the_old_name_of_top_logprobs_warns() -> None:
    (result,) = gptfast.generate(make("course"), [[1]], max_new_tokens=2, logprobs=2)
    with pytest.warns(DeprecationWarning, match="use Generation.top_logprobs"):
        assert result.alternatives == result.top_logprobs != []


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


def address_space() -> int:
    """Returns the size of this process's address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.skipif(select.extension() is None, reason="the engine is compiled")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux counts a process's pages")
def test_a_limit_of_billions_of_tokens_takes_the_memory_of_those_that_there_are() -> None:
    model, before = make("course"), address_space()
    options: dict[str, Any] = {"max_new_tokens": 2_000_000_000, "logprobs": 5}
    results = interrupted_soon(lambda: gptfast.generate(model, [[1], [2]], **options), 0.3)
    made = sum(len(each.tokens) for each in results)
    assert made > 0 and all(each.finish_reason == "interrupted" for each in results)
    assert all(len(each.top_logprobs) == len(each.tokens) for each in results)
    assert address_space() - before < 2**30


def test_options_of_zero_tokens_and_no_prompts() -> None:
    model = make("course")
    assert gptfast.generate(model, []) == []
    (result,) = gptfast.generate(model, [[1]], max_new_tokens=0)
    assert result.tokens == [] and result.finish_reason == "length"


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


@pytest.mark.skipif(select.extension() is None, reason="the engine is compiled")
def test_a_text_that_waits_takes_the_place_of_one_that_ends_at_once() -> None:
    model = make("odd")
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 1}
    prompts = [[1], [2], [3], [4]]
    free = [result.tokens for result in gptfast.generate(model, prompts, **options)]
    stop = free[0][5]  # the steps of each sequence, including that of the stop token
    steps = [tokens.index(stop) + 1 if stop in tokens else 40 for tokens in free]
    places = [0, 0]  # the step at which each of the two slots becomes free
    for own in steps:
        places[places.index(min(places))] += own
    packed = gptfast.pack(model)
    engine = Engine(packed, make_request(packed, prompts, stop=stop, max_batch=2, **options))
    calls = 1
    while engine.run(0.0):  # one step
        calls += 1
    assert calls == max(places) < max(steps[:2]) + max(steps[2:])


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_stream_gives_what_generate_gives(backend: Any) -> None:
    model, tokenizer = text_model()
    model.backend = backend
    (whole,) = gptfast.generate(model, ["a "], tokenizer=tokenizer, max_new_tokens=25, seed=9)
    pieces = list(gptfast.stream(model, "a ", tokenizer=tokenizer, max_new_tokens=25, seed=9))
    assert "".join(map(str, pieces)) == whole.text and len(pieces[0]) == 1
    tokens = [t for piece in gptfast.stream(model, [1, 2], max_new_tokens=25) for t in piece]
    assert tokens == gptfast.generate(model, [[1, 2]], max_new_tokens=25)[0].tokens


@pytest.mark.parametrize("dtype", (None, "int8"))
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_a_stream_is_of_the_model_as_it_was_at_the_call(backend: Any, dtype: str | None) -> None:
    model = make("course")
    model.backend = backend
    options: dict[str, Any] = {"max_new_tokens": 30, "dtype": dtype}
    (whole,) = gptfast.generate(model, [[1, 2]], **options)
    pieces = gptfast.stream(model, [1, 2], **options)
    with torch.no_grad():
        for param in model.parameters():
            param.neg_()
    tokens = [t for t in next(pieces) if isinstance(t, int)]
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    tokens += [t for piece in pieces for t in piece]
    assert tokens == whole.tokens


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_stream_of_several_prompts(backend: Any) -> None:
    model, tokenizer = text_model()
    model.backend = backend
    prompts = ["a ", "the", "sat on"]
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "max_new_tokens": 120, "num_samples": 2, "stop": "ca",
        "max_batch": 4,
    }  # fmt: skip
    whole = gptfast.generate(model, prompts, **options)
    texts = [""] * 6
    for i, piece in gptfast.stream(model, prompts, **options):
        texts[i] += piece
    assert texts == [each.text for each in whole]


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_interrupt_ends_a_stream_after_what_there_is(backend: Any) -> None:
    model, tokens = make("course"), []
    model.backend = backend

    def read() -> None:
        for piece in gptfast.stream(model, [1], max_new_tokens=10**6):
            tokens.extend(piece)

    with pytest.raises(KeyboardInterrupt):
        interrupted_soon(read, 0.3)
    (whole,) = gptfast.generate(model, [[1]], max_new_tokens=10)
    assert tokens and tokens[:10] == whole.tokens[: len(tokens)]


def test_stream_of_no_prompts_and_of_what_is_read_once() -> None:
    model, options = make("course"), {"max_new_tokens": 5}
    assert list(gptfast.stream(model, [], **options)) == []
    assert list(gptfast.stream(model, iter([]), **options)) == []
    (whole,) = gptfast.generate(model, [[1, 2]], **options)
    for prompt in (iter([1, 2]), torch.tensor([1, 2])):
        assert [
            t for piece in gptfast.stream(model, prompt, **options) for t in piece
        ] == whole.tokens
    both = gptfast.generate(model, [[1], [2]], **options)
    for prompts in (iter([[1], [2]]), torch.tensor([[1], [2]])):
        found: list[list[int]] = [[], []]
        for i, piece in gptfast.stream(model, prompts, **options):
            found[i] += piece
        assert found == [each.tokens for each in both]


def test_counts_may_be_whole_numbers_of_any_type() -> None:
    model, same = make("course"), {"max_new_tokens": 5, "top_k": 2, "seed": 3}
    expected = gptfast.generate(model, [[1]], **same)
    assert Sampling(top_k=np.int64(2)) == Sampling(top_k=2)
    assert type(Sampling(top_k=np.int64(2)).top_k) is int
    for number in (np.int32, torch.tensor):
        options = {name: number(value) for name, value in same.items()}
        assert gptfast.generate(model, [[1]], **options) == expected


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_options_may_be_numbers_of_any_type(backend: Any) -> None:
    model, same = make("course"), {"temperature": 0.5, "top_p": 0.75, "min_p": 0.25}
    model.backend = backend
    expected = gptfast.generate(model, [[1]], max_new_tokens=5, **same)
    for number in (np.float32, Fraction):
        options = {name: number(value) for name, value in same.items()}
        assert gptfast.generate(model, [[1]], max_new_tokens=5, **options) == expected
    for prompts in (np.array([[1]], dtype=np.uint8), [np.array([1])]):
        assert gptfast.generate(model, prompts, max_new_tokens=5, **same) == expected


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_a_top_k_of_zero_is_none(backend: Any) -> None:
    model = make("odd")
    model.backend = backend
    both = [gptfast.generate(model, [[1]], max_new_tokens=20, top_k=k) for k in (0, None)]
    assert both[0] == both[1] and Sampling(top_k=0) == Sampling()


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_the_numbers_of_no_limit_are_none(backend: Any) -> None:
    assert Sampling(top_k=None, top_p=None, min_p=None) == Sampling(top_k=0, top_p=1.0, min_p=0.0)
    model = make("odd")
    model.backend = backend
    both = [
        gptfast.generate(model, [[1]], max_new_tokens=20, top_k=k, top_p=p, min_p=m)
        for k, p, m in ((None, None, None), (10**30, 1.0, 0.0))
    ]
    assert both[0] == both[1]


def test_stream_starts_before_all_is_generated() -> None:
    model = make("course")
    pieces = gptfast.stream(model, [1], max_new_tokens=10**6)  # the whole call would take a minute
    assert len(next(pieces)) == 1 and len(next(pieces)) < 10_000


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


def test_stream_checks_at_the_call() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        gptfast.stream(make("course"), [1], temperature=-1)
    with pytest.raises(ConfigError, match="num_samples must be 1 for a single prompt .*, got 0"):
        gptfast.stream(make("course"), [1], num_samples=0)
    with pytest.raises(ConfigError, match="prompt 0 must be a text or a list .*, got None"):
        gptfast.stream(make("course"), None)
    with pytest.raises(TypeError, match="has no option 'beams'; it has tokenizer, max_new_tokens"):
        gptfast.stream(make("course"), [1], beams=2)
