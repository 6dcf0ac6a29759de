"""The benchmarks of generation: their prompts, their verification, and peers that are wrong.

Nothing here depends on a package that they compare with, or on how exact one is.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_generate
import bench_gpt2
import command
import generation_peers
import pytest
import report
import torch
from bench_generate import Shape
from common import OURS
from generation_peers import Generate, Tokens

from gptfast import GPTConfig
from gptfast.ops import select

pytest.importorskip("tokenizers", reason="prompts of bench_gpt2.py are byte pairs")
if select.extension() is None:
    pytest.skip(f"{select.extension_error}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SMALL = GPTConfig(
    block_size=192, vocab_size=400, n_layer=2, n_head=2, n_embd=32, gelu="tanh", tie_weights=True,
    padding_idx=None, init="gpt2",
)  # fmt: skip
# 90 paragraphs of 5 to 25 words, each of which becomes a token.
TEXT = "\n\n".join(
    " ".join(f"word{(7 * i + j) % 100}" for j in range(5 + i % 21)) for i in range(90)
)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all packages seem missing, and the peak cost nothing."""
    monkeypatch.setattr(generation_peers, "installed", lambda *_: False)
    monkeypatch.setattr(command, "peak", lambda *_: {"gflops": 1.0, "by": "nobody", "size": "0"})


def quick(*options: str) -> int:
    return bench_generate.run(["--quick", "--dtype", "fp32", "--threads", "1", *options])


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


def test_a_peer_that_is_wrong_leaves_its_row_with_a_note(
    no_peers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = bench_generate.SHAPES[0]
    makers = bench_generate.makers

    def unlikeliest() -> Generate:
        prompt = bench_generate.prompts_of(shape)[0]
        logits = bench_generate.exact_logits(shape.model, None, tuple(prompt), 1, False)
        return lambda: [[int(logits.argmin())] * shape.new]

    def with_peers(*args: Any) -> dict[str, Callable[[], Generate]]:
        right = lambda: bench_generate.ours(shape, "fp32")  # noqa: E731
        return makers(*args) | {"wrong peer": unlikeliest, "right peer": right}

    monkeypatch.setattr(bench_generate, "makers", with_peers)
    assert quick("--out", str(tmp_path / "generate.json")) == 0
    table, result = last_line(capsys)
    (row,) = result["rows"]
    assert result["failed"] == []
    assert row["ms"].keys() == {OURS, "course", "SDPA loop", "SDPA, cache", "right peer"}
    assert row["notes"].keys() == {"wrong peer"}
    note = row["notes"]["wrong peer"]
    assert note.startswith("not timed: takes unlikely tokens: an error of ")
    assert f"S, batch 1, fp32: wrong peer: {note}" in table
    assert json.loads((tmp_path / "generate.json").read_text()) == result
    assert f"- S, batch 1, fp32: wrong peer: {note}" in report.report([result]).splitlines()


def test_our_own_mistake_fails_the_row(
    no_peers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = bench_generate.ours

    def one_too_few(*args: Any) -> Generate:
        run = ours(*args)
        return lambda: [row[:-1] for row in run()]

    monkeypatch.setattr(bench_generate, "ours", one_too_few)
    assert quick() == 1
    _, result = last_line(capsys)
    assert result["rows"] == []
    assert [row["why"] for row in result["failed"]] == [
        "gptfast generates another number of tokens"
    ]


def ragged(new: int = 6, shortest: int = 1) -> Shape:
    lengths = (3, 11, shortest, 8)
    generator = torch.Generator().manual_seed(1)
    texts = tuple(tuple(torch.randint(1, 400, (n,), generator=generator).tolist()) for n in lengths)
    return Shape("L", SMALL, max(lengths), new, len(texts), texts=texts)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_torch_with_a_cache_takes_prompts_of_any_lengths(dtype: str, no_peers: None) -> None:
    shape = ragged()
    made = bench_generate.makers(shape, dtype)
    assert list(made) == [OURS, "SDPA, cache"]
    contenders = {name: make() for name, make in made.items()}
    assert bench_generate.verify(shape, dtype, contenders) == {}
    if dtype == "fp32":
        assert contenders["SDPA, cache"]() == [alone(shape, text) for text in shape.texts]


def alone(shape: Shape, text: tuple[int, ...]) -> list[int]:
    model = bench_generate.model_of(shape.model)
    (tokens,) = generation_peers.sdpa_loop(model, "fp32", [list(text)], shape.new)()
    return tokens


def test_each_token_of_the_shortest_and_the_longest_text_is_verified(no_peers: None) -> None:
    shape = ragged()
    right = bench_generate.ours(shape, "fp32")()
    assert bench_generate.mistake(shape, "fp32", "peer", right) is None
    for text, found in ((1, True), (2, True), (0, False)):
        wrong = [list(row) for row in right]
        wrong[text][-1] = least_likely(shape, text, right)
        why = bench_generate.mistake(shape, "fp32", "peer", wrong)
        assert (why is not None and f"in text {text}, above 0.001" in why) == found


def least_likely(shape: Shape, i: int, tokens: Tokens) -> int:
    text = (*shape.texts[i], *tokens[i][:-1])
    return int(bench_generate.exact_logits(shape.model, None, text, 1, False).argmin())


def test_work_and_tokens_are_those_of_each_prompt() -> None:
    shape = ragged()
    each = [replace(shape, batch=1, texts=(text,)) for text in shape.texts]
    assert shape.flops == sum(one.flops for one in each)
    same = replace(each[0], prompt=3, texts=())
    assert (each[0].flops, each[0].tokens) == (same.flops, same.tokens)
    assert (shape.tokens, replace(shape, new=1).tokens) == (4 * 6, 3 + 11 + 1 + 8)


def test_latencies_of_prompts_that_take_several_passes(
    no_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts at the front are ahead of the others then, and end before them."""
    monkeypatch.setattr(bench_generate, "LATENCY_STEPS", 12)
    texts = tuple((1 + i,) * (20 + 9 * i) for i in range(18))  # 1737 tokens
    shape = Shape("L", SMALL, 173, 4, len(texts), texts=texts)
    found = bench_generate.details(shape, "fp32", 0.5)
    assert found["steps"] == 12 and found["tokens/s"] == 4 * 18 / 0.5
    assert bench_generate.details(replace(shape, new=1), "fp32", 0.5)["tokens/s"] == 2 * 1737


def small_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpt2, "L", SMALL)
    monkeypatch.setattr(bench_gpt2, "BATCHES", {1: 3, 8: 2, 64: 2})
    monkeypatch.setattr(bench_gpt2, "LONG_PROMPT", 150)


def test_prompts_are_paragraphs_as_byte_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    small_gpt2(monkeypatch)
    *batches, first = bench_gpt2.shapes(TEXT)
    assert [(shape.batch, shape.new) for shape in batches] == [(1, 3), (8, 2), (64, 2)]
    for shape in batches:
        assert shape.texts == batches[-1].texts[: shape.batch]
        assert shape.prompt == max(shape.lengths)
        assert all(8 <= length <= 128 for length in shape.lengths)
        assert max(map(max, shape.texts)) < SMALL.vocab_size
    assert len(set(batches[-1].lengths)) > 10
    assert (first.lengths, first.new, first.tokens) == ([150], 1, 150)
    assert str(first) == "L, prompt of 150 tokens"


def test_rows_of_gpt2(
    no_peers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_gpt2(monkeypatch)
    monkeypatch.setattr(bench_generate, "LATENCY_STEPS", 2)
    text = tmp_path / "text"
    text.write_text(TEXT)
    assert bench_gpt2.run(["--data", str(text), "--seconds", "0.001", "--threads", "1"]) == 0
    _, result = last_line(capsys)
    assert result["script"] == "gpt2" and result["failed"] == []
    assert [row["notes"] for row in result["rows"]] == [{}] * 12
    names = [row["name"] for row in result["rows"] if row["dtype"] == "fp32"]
    assert names == [f"L, batch {n}" for n in (1, 8, 64)] + ["L, prompt of 150 tokens"]
    page = report.report([result])
    assert "|  | fp32, tokens/s | x best other | of peak | bf16, tokens/s |" in page
    assert "\n| L, prompt of 150 tokens, int8 | - | - | - |" in page


def test_results_of_gpt2_have_every_row() -> None:
    path = ROOT / "benchmarks" / "results" / "gpt2.json"
    if not path.exists():
        pytest.skip("no results of bench_gpt2.py have been committed yet")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    expected = list(bench_gpt2.rows(TEXT))
    assert [(row["name"], row["dtype"]) for row in rows] == [(e.name, e.dtype) for e in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    (
        (None, "no such file"),
        ("a few words", "--data: the text has 0 paragraphs of 8 to 128 tokens, but 64 are needed"),
        (
            "\n\n".join(["one two three four five six seven eight"] * 64),
            "tokens, but 900 are needed",
        ),
    ),
)
def test_texts_that_are_too_short(
    text: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "run", None)  # nothing is timed
    path = tmp_path / "absent"
    if text is not None:
        path = tmp_path / "text"
        path.write_text(text)
    assert bench_gpt2.run(["--data", str(path)]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and message in errors
    assert errors.startswith("bench_gpt2: ") and len(errors.splitlines()) == 1


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "int8"))
@pytest.mark.parametrize("peer", ("CTranslate2", "llama.cpp"))
def test_engines_load_the_models_weights_and_repeat_themselves(peer: str, dtype: str) -> None:
    """How exactly they compute is not ours to test: wrong weights err by half of a logit's size."""
    shape = ragged(shortest=2)  # CTranslate2 returns the prompts too where one is a single token
    make = bench_generate.makers(shape, dtype).get(peer)
    if make is None:
        pytest.skip(f"{peer} is not installed, or does not compute in {dtype}")
    run = make()
    tokens = run()
    assert [len(row) for row in tokens] == [6] * 4 and run() == tokens
    for prompt, new in zip(bench_generate.prompts_of(shape), tokens, strict=True):
        assert bench_generate.largest_gap(shape, None, prompt, new) < 0.5


@pytest.mark.parametrize("peer", ("transformers", "CTranslate2", "llama.cpp"))
def test_peers_take_part_where_they_are_installed_and_can(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, past = bench_generate.SHAPES[0], bench_generate.SHAPES[-1]
    monkeypatch.setattr(generation_peers, "installed", lambda *_: True)
    assert peer in bench_generate.makers(inside, "fp32")
    assert peer in bench_generate.makers(ragged(), "fp32")
    assert peer not in bench_generate.makers(past, "fp32")
    monkeypatch.setattr(generation_peers, "installed", lambda *_: False)
    assert peer not in bench_generate.makers(inside, "fp32")
