"""Sampling: the draws and their seeds, filters, top log-probabilities, types of the options."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from generating import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.ops.sampling import Sampling, choose, draws, probabilities


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
