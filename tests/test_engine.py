"""The compiled engine rejects arguments that would lead to accesses out of bounds."""

from dataclasses import replace
from typing import Any

import pytest
import small_models

import gptfast
from gptfast import GPTConfig
from gptfast.generation.engine import PackedModel
from gptfast.ops import select

if select.extension() is None:
    pytest.skip(f"{select.extension_error}", allow_module_level=True)

CONFIG = GPTConfig(block_size=8, vocab_size=7, n_layer=2, n_head=2, n_embd=20)
extension: Any = select.extension()


def packed(**options: Any) -> PackedModel:
    return gptfast.pack(small_models.model_of(replace(CONFIG, **options)).eval())


def options(**values: Any) -> Any:
    found = extension.SessionOptions()
    for name, value in (dict(max_new_tokens=4, capacity=8, slots=2, stride=1) | values).items():
        setattr(found, name, value)
    return found


def session(model: PackedModel, prompts: list[list[int]], **values: Any) -> Any:
    zeros = [0] * len(prompts)
    return extension.Session(model.compiled, prompts, zeros, zeros, options(**values))


def model_of(params: dict[str, Any], **changes: Any) -> Any:
    fields = dict(
        block_size=8, vocab_size=7, n_layer=2, n_head=2, n_embd=20, attention=True, gelu="erf",
        bf16=False, int8=False, find=params.get, copy=True,
    )  # fmt: skip
    return extension.Model(**fields | changes)


def params() -> dict[str, Any]:
    state = small_models.model_of(CONFIG).state_dict()
    return {name: param.numpy() for name, param in state.items()}


@pytest.mark.parametrize("name", sorted(params()))
def test_a_parameter_of_another_shape_or_kind_is_refused_by_name(name: str) -> None:
    own = params()
    assert model_of(own).packed_bytes > 0
    wrong = {
        r", got \"f\" of shape": own[name][1:],
        r', got "d" of shape': own[name].astype("float64"),
        r", got no buffer": 3,
    }
    if name.endswith("weight"):
        wrong[r", got none"] = None
    if own[name].ndim > 1:
        wrong[r", got \"f\" of shape .*, not dense"] = own[name].T.copy().T
    for message, value in wrong.items():
        with pytest.raises(ValueError, match=f"pack: {name} must be .*{message}"):
            model_of(own | {name: value})


def test_a_config_that_makes_no_model_is_refused() -> None:
    for change in ({"n_layer": 0}, {"n_head": 3}, {"n_embd": -20}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match="pack: the config must have sizes above 0"):
            model_of(params(), **change)


def test_an_error_while_parameters_are_found_passes_through() -> None:
    def find(name: str) -> Any:
        if name == "h.1.ln_2.weight":
            raise KeyError(name)
        return params()[name]

    with pytest.raises(KeyError, match="h.1.ln_2"):
        model_of({}, find=find)


@pytest.mark.parametrize(
    ("prompts", "values", "message"),
    (
        ([[1], [1, 7]], {}, r"generate: tokens must be in \[0, 7\), got 7"),
        ([[-1]], {}, r"generate: tokens must be in \[0, 7\), got -1"),
        ([[1], []], {}, "generate: prompt 1 must have a token"),
        ([[1], [1] * 3], {"capacity": 5}, "prompt 1 must fit into the cache's capacity"),
        ([[1] * 30], {"capacity": 7}, "prompt 0 must fit into the cache's capacity"),
        ([[1]], {"max_new_tokens": 2**63 - 1, "capacity": 7}, "must fit into the cache's capacity"),
        ([[1]], {"capacity": 9}, r"capacity must be in \[1, 8\], got 9"),
        ([[1]], {"capacity": 0}, r"capacity must be in \[1, 8\], got 0"),
        ([[1]], {"slots": 0}, "slots must be above 0"),
        ([[1]], {"max_new_tokens": -1}, "an option is out of its range"),
        ([[1]], {"stride": 9}, "an option is out of its range"),
        ([[1]], {"top_logprobs": 8}, "an option is out of its range"),
        ([[1]], {"sampling": (-1.0, 0, 1.0, 0.0, 1.0)}, "an option is out of its range"),
        ([[1]], {"sampling": (1.0, 0, float("nan"), 0.0, 1.0)}, "an option is out of its range"),
        ([[1]], {"stop_strings": [b"a"], "pieces": [b"a"] * 6}, "pieces must be one per token"),
    ),
)
def test_a_session_refuses_what_has_no_place(
    prompts: list[list[int]], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        session(packed(), prompts, **values)


def test_the_first_layers_table_needs_attention_in_two_layers() -> None:
    for model in (packed(n_layer=1), packed(attention=False)):
        with pytest.raises(ValueError, match="first_layer_table is for a model with attention"):
            session(model, [[1]], first_layer_table=True)


def test_updates_are_of_all_sequences_first_and_then_of_what_is_new() -> None:
    own = session(packed(), [[1], [2, 3], [4]], top_logprobs=2, stop_tokens=[0])
    assert [(i, state) for i, state, *_ in own.updates()] == [(i, "waiting") for i in range(3)]
    assert own.updates() == []
    tokens: dict[int, list[int]] = {}
    more = True
    while more:
        more = own.run(0.0)
        for i, state, new, logprobs, top_logprobs in own.updates():
            assert len(new) == len(logprobs) == len(top_logprobs) <= 1
            assert state in ("running", "length", "stop")
            assert all(len(row) == 2 for row in top_logprobs)
            tokens.setdefault(i, []).extend(new)
    expected = session(packed(), [[1], [2, 3], [4]], stop_tokens=[0])
    assert not expected.run(60.0)
    assert {i: new for i, _, new, *_ in expected.updates()} == tokens


def test_score_refuses_windows_that_do_not_fit() -> None:
    model = packed()
    for windows, message in (
        ([[1, 2], [1, 7]], r"score: tokens must be in \[0, 7\), got 7"),
        ([[1, -2]], r"score: tokens must be in \[0, 7\), got -2"),
        ([[1]], "score: a window must have 2 to 9 tokens, got 1"),
        ([[1] * 10], "score: a window must have 2 to 9 tokens, got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score(windows)
    assert model.score([]) == []


def test_a_model_packed_for_another_level_is_refused() -> None:
    before = extension.isa_current()
    model = packed()
    extension.isa_set("generic")
    try:
        if before == "generic":
            pytest.skip("this machine has the generic level alone")
        for op, call in (("score", gptfast.score), ("generate", gptfast.generate)):
            with pytest.raises(RuntimeError, match=f"{op}: the model was packed for {before}"):
                call(model, [[1, 2]])  # type: ignore[operator]
    finally:
        extension.isa_set(before)
    assert gptfast.generate(model, [[1, 2]], max_new_tokens=2)


def test_a_session_keeps_its_model_alive() -> None:
    model = packed()
    expected = session(model, [[1, 2]])
    own = session(packed(), [[1, 2]])  # only the session refers to this model
    expected.run(60.0), own.run(60.0)
    assert own.updates() == expected.updates()
