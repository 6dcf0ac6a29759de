"""Texts and streams: stops, pieces as they come, interrupts."""

from typing import Any

import pytest
import torch
from generating import interrupted_soon, make, text_model

import gptfast
from gptfast import ConfigError
from gptfast.generation import make_request
from gptfast.generation.engine import Engine
from gptfast.ops import select


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


def test_stream_starts_before_all_is_generated() -> None:
    model = make("course")
    pieces = gptfast.stream(model, [1], max_new_tokens=10**6)  # the whole call would take a minute
    assert len(next(pieces)) == 1 and len(next(pieces)) < 10_000


def test_stream_checks_at_the_call() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        gptfast.stream(make("course"), [1], temperature=-1)
    with pytest.raises(ConfigError, match="num_samples must be 1 for a single prompt .*, got 0"):
        gptfast.stream(make("course"), [1], num_samples=0)
    with pytest.raises(ConfigError, match="prompt 0 must be a text or a list .*, got None"):
        gptfast.stream(make("course"), None)
    with pytest.raises(TypeError, match="has no option 'beams'; it has tokenizer, max_new_tokens"):
        gptfast.stream(make("course"), [1], beams=2)
