"""gptfast as a model of lm-evaluation-harness, by the real package on tasks of files made here."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import model_of

import gptfast
from gptfast import GPT, BPETokenizer, CharTokenizer, ConfigError, DataError, GPTConfig

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is missing: pip install 'gptfast-kernels[eval]'"
)
for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ[name] = "1"  # before datasets is imported: nothing here needs the network

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows  # noqa: E402

from gptfast.lm_eval import GptfastLM, generation_options  # noqa: E402

TEXT = "the cat sat on the mat, and the café was near.\n"
T = 12
# Sums of at most 40 log-probabilities in float32, each of which two ways of computing round
# differently by about 1e-6.
CLOSE = 1e-4


def model_for(tokenizer: CharTokenizer | BPETokenizer) -> GPT:
    """A model without training, whose logits differ much."""
    shape = {"block_size": T, "n_embd": 32, "n_layer": 2, "padding_idx": tokenizer.padding}
    model = model_of(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), seed=1, scale=2.0).eval()
    model.lm_head.weight.data[0] = 0  # padding or the end, which is never the likeliest then
    return model


@pytest.fixture(scope="module")
def characters() -> GptfastLM:
    tokenizer = CharTokenizer.from_text(TEXT)
    return GptfastLM((model_for(tokenizer), tokenizer))


@pytest.fixture(scope="module")
def pairs_of_bytes() -> GptfastLM:
    tokenizer = BPETokenizer.train(TEXT * 3, 280)
    return GptfastLM((model_for(tokenizer), tokenizer))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, characters: GptfastLM) -> Path:
    path = tmp_path_factory.mktemp("run")
    gptfast.save(characters.model, characters.tokenizer, path)
    return path


def requests_of(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


def log_probabilities(model: GPT, text: list[int], new: int) -> torch.Tensor:
    """Of all tokens, (new, V), where the last `new` of a text in one window stand."""
    assert len(text) - 1 <= T
    logits = model(torch.tensor([text[:-1]]))[0].detach().double()
    return logits.log_softmax(-1)[-new:]


def by_hand(model: GPT, text: list[int], new: int) -> tuple[float, bool]:
    """The log-probability of the last `new` tokens of a text, and whether they are greedy."""
    found, wanted = log_probabilities(model, text, new), torch.tensor(text[-new:])
    return found.gather(-1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())


def check(lm: GptfastLM, pairs: list[tuple[str, str]], expected: list[tuple[float, bool]]) -> None:
    found = lm.loglikelihood(requests_of(*pairs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    values = [value for value, _ in found]
    assert values == pytest.approx([value for value, _ in expected], abs=CLOSE)


def test_continuations_by_characters(characters: GptfastLM) -> None:
    model, encode = characters.model, characters.tokenizer.encode
    (likely,) = gptfast.generate(
        model, ["the "], tokenizer=characters.tokenizer, max_new_tokens=9, temperature=0
    )
    assert likely.text is not None
    other = likely.text[:-1] + ("a" if likely.text[-1] != "a" else "b")
    long = TEXT[:20]  # of which the window holds the end
    pairs = [("the ", likely.text), ("the ", other), ("the ", "c"), ("", "cat"), ("the", " cat")]
    pairs += [("the ", likely.text[:1]), (long, "mat"), ("the ", "cat")]
    texts = ["\n" + "cat" if not context else context + text for context, text in pairs]
    expected = [
        by_hand(model, encode(text)[-T - 1 :], len(pair[1]))
        for text, pair in zip(texts, pairs, strict=True)
    ]
    assert [greedy for _, greedy in expected][:2] == [True, False]
    check(characters, pairs, expected)
    assert characters.loglikelihood([]) == []


def test_a_continuation_longer_than_the_window_is_scored_whole(characters: GptfastLM) -> None:
    text = TEXT[: T + 9]
    ids = characters.tokenizer.encode("e" + text)  # one token of the context is left
    (scored,) = gptfast.score(characters.model, [ids], stride=T)
    [(found, greedy)] = characters.loglikelihood(requests_of(("the", text)))
    assert found == pytest.approx(scored.logprob, abs=CLOSE) and not greedy
    (likely,) = gptfast.generate(
        characters.model, ["e"], tokenizer=characters.tokenizer, max_new_tokens=30, temperature=0
    )
    [(_, greedy)] = characters.loglikelihood(requests_of(("the", likely.text)))
    assert greedy


def test_continuations_by_byte_pairs(pairs_of_bytes: GptfastLM) -> None:
    model, tokenizer = pairs_of_bytes.model, pairs_of_bytes.tokenizer
    encode, end = tokenizer.encode, tokenizer.end_of_text
    # The space before a word belongs to its token, wherever the task has it.
    whole = encode("the cat")
    assert whole == encode("the") + encode(" cat") != encode("the ") + encode("cat")
    expected = by_hand(model, whole, len(encode(" cat")))
    check(pairs_of_bytes, [("the", " cat"), ("the ", "cat")], [expected] * 2)
    for context, text in (("", "cat"), ("  ", "cat")):  # both begin after the end of a text
        own = encode(context + text)
        check(pairs_of_bytes, [(context, text)], [by_hand(model, [end, *own], len(own))])
    # A token of the whole would hold the boundary within it: the parts have tokens of their own.
    assert encode("the cat")[:1] != encode("t")
    parts = encode("t") + encode("he cat")
    check(pairs_of_bytes, [("t", "he cat")], [by_hand(model, parts, len(encode("he cat")))])


@pytest.mark.parametrize("stride", (None, 1, 5))
@pytest.mark.parametrize("kind", ("characters", "pairs_of_bytes"))
def test_whole_texts_in_the_windows_of_lm_eval(
    kind: str, stride: int | None, request: pytest.FixtureRequest
) -> None:
    known: GptfastLM = request.getfixturevalue(kind)
    model, tokenizer = known.model, known.tokenizer
    lm = GptfastLM((model, tokenizer), stride=stride)
    texts = [TEXT, "a", TEXT[: T - 1], "", TEXT * 2]
    found = lm.loglikelihood_rolling(requests_of(*((text,) for text in texts)))
    start = tokenizer.encode("\n")[0] if tokenizer.end_of_text is None else tokenizer.end_of_text
    for text, value in zip(texts, found, strict=True):
        windows = get_rolling_token_windows(
            tokenizer.encode(text), start, T, 1 if stride is None else T - stride + 1
        )
        parts = [by_hand(model, a + b[-1:], len(b))[0] for a, b in windows]
        assert value == pytest.approx(sum(parts), abs=5 * CLOSE)  # up to 96 terms


def test_answers(characters: GptfastLM) -> None:
    model, tokenizer = characters.model, characters.tokenizer
    greedy = {"until": ["\n", ""], "max_gen_toks": 30}
    drawn = {"until": [], "max_gen_toks": 20, "do_sample": True, "top_k": 5}
    given = [
        ("the ", greedy),
        ("cat", drawn),
        ("", greedy),
        ("cat", drawn),
        ("mat", {"until": "c"}),
    ]
    found = characters.generate_until(requests_of(*given))
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 30, "temperature": 0}
    free = gptfast.generate(model, ["the ", "\n"], **options)
    assert [found[0], found[2]] == [str(each.text).split("\n")[0] for each in free]
    options = {"tokenizer": tokenizer, "max_new_tokens": 20, "top_k": 5}
    drawings = gptfast.generate(model, ["cat"] * 2, **options)
    assert [found[1], found[3]] == [each.text for each in drawings] and found[1] != found[3]
    (last,) = gptfast.generate(
        model, ["mat"], tokenizer=tokenizer, max_new_tokens=256, temperature=0, stop="c"
    )
    assert found[4] == last.text
    again = GptfastLM((model, tokenizer), seed=1).generate_until(requests_of(*given))
    assert again[0] == found[0] and again[1] != found[1]


def test_an_answer_ends_at_the_end_of_text(pairs_of_bytes: GptfastLM) -> None:
    model, tokenizer = copy.deepcopy(pairs_of_bytes.model), pairs_of_bytes.tokenizer
    model.lm_head.weight.data.zero_()  # the first token of those as likely is taken: the end
    assert tokenizer.end_of_text == 0
    lm = GptfastLM((model, tokenizer))
    assert lm.generate_until(requests_of(("the", {"max_gen_toks": 5}))) == [""]
    assert lm.loglikelihood(requests_of(("the", " cat")))[0][1] is False


@pytest.mark.parametrize(
    ("task", "expected"),
    (
        ({}, {"max_new_tokens": 256, "stop": [], "temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "min_p": 0.1, "top_k": None}, {"min_p": 0.1}),
        ({"until": "x", "max_tokens": 3, "max_gen_toks": 4}, {"stop": ["x"], "max_new_tokens": 4}),
        ({"num_beams": 1, "max_new_tokens": 7}, {"max_new_tokens": 7}),
        ({"until": iter(["\n", ""])}, {"stop": ["\n"]}),
    ),
)
def test_options_of_a_task(task: dict[str, Any], expected: dict[str, Any]) -> None:
    found = generation_options(task)
    assert {name: found[name] for name in expected} == expected
    assert ("temperature" in found) == ("temperature" in expected or not task.get("do_sample"))


@pytest.mark.parametrize("task", ({"until": 5}, {"until": ["x", 5]}, {"temperature": "x"}))
def test_options_of_a_wrong_kind_are_sentences(task: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="(until|temperature) must be a"):
        generation_options(task)


def test_mistakes_are_sentences(characters: GptfastLM) -> None:
    with pytest.raises(DataError, match=r"request 1: character 'é' at position 4 .* 5 characters"):
        lm = GptfastLM((model_for(few := CharTokenizer(tuple("\nabcf"))), few))
        lm.loglikelihood(requests_of(("abc", "caf"), ("b", "café")))
    with pytest.raises(DataError, match="request 0: the continuation is empty"):
        characters.loglikelihood(requests_of(("the", "")))
    for options, message in (
        ({"stop": ["a"]}, "there is no option 'stop' of generation; there are until, max_gen_toks"),
        ({"num_beams": 4}, "num_beams must be 1, got 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            characters.generate_until(requests_of(("the", options)))
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        GptfastLM((characters.model, None))
    abc = CharTokenizer(tuple("ABC"))
    lm = GptfastLM((model_for(abc), abc))
    with pytest.raises(ConfigError, match=r"begin after \(prefix\): character '\\n'"):
        lm.loglikelihood_rolling(requests_of(("AB",)))
    for prefix in ("A", "BA"):
        lm = GptfastLM((lm.model, abc), prefix=prefix)
        [found] = lm.loglikelihood_rolling(requests_of(("AB",)))
        expected, _ = by_hand(lm.model, abc.encode(prefix + "AB"), 2)
        assert found == pytest.approx(expected, abs=CLOSE)
    with pytest.raises(ConfigError, match="prefix must have at least one token, got ''"):
        GptfastLM((lm.model, abc), prefix="").loglikelihood_rolling(requests_of(("AB",)))


# ---- whole tasks

DOCUMENTS = [
    {"question": "the c", "choices": ["at", "afé", "mat"], "answer": 0, "text": TEXT},
    {"question": "sat on ", "choices": ["the mat", "a"], "answer": 1, "text": "the café was\n"},
    {"question": "near", "choices": [",", " the", "."], "answer": 2, "text": "a cat sat" * 3},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
"""
ANSWER = """
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS), encoding="utf-8")
    kinds = {"choice": ("multiple_choice", CHOICE), "rolling": ("loglikelihood_rolling", ROLLING)}
    kinds["answer"] = ("generate_until", ANSWER)
    for name, (kind, rest) in kinds.items():
        head = TASK.format(name=f"gptfast_{name}", data=data, kind=kind)
        (folder / f"{name}.yaml").write_text(head + rest)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    return folder


def evaluated(tasks: Path, model: Any, **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[f"gptfast_{name}" for name in ("choice", "rolling", "answer")],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


def test_whole_tasks(tasks: Path, characters: GptfastLM) -> None:
    model, encode = characters.model, characters.tokenizer.encode
    found = evaluated(tasks, characters)
    right, nats, size = 0, 0.0, 0
    for each in DOCUMENTS:
        scores = []
        for choice in each["choices"]:
            text = encode(each["question"] + choice)[-T - 1 :]
            scores.append(by_hand(model, text, len(choice))[0])
        right += scores.index(max(scores)) == each["answer"]
        windows = get_rolling_token_windows(encode(each["text"]), encode("\n")[0], T, 1)
        nats -= sum(by_hand(model, a + b[-1:], len(b))[0] for a, b in windows)
        size += len(each["text"].encode("utf-8"))
    results = found["results"]
    assert results["gptfast_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
    bits = nats / math.log(2) / size
    assert results["gptfast_rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=CLOSE)
    perplexity = results["gptfast_rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(2**bits, rel=CLOSE)
    for sample, each in zip(found["samples"]["gptfast_answer"], DOCUMENTS, strict=True):
        (answer,) = gptfast.generate(
            model,
            [each["question"]],
            tokenizer=characters.tokenizer,
            max_new_tokens=8,
            temperature=0,
            stop="e",
        )
        assert sample["resps"] == [[answer.text]]


def test_the_model_has_a_name_there(tasks: Path, run: Path) -> None:
    options = {"model_args": f"path={run},stride=5", "batch_size": 4, "device": "cpu"}
    named = evaluated(tasks, "gptfast", **options)["results"]
    other = evaluated(tasks, GptfastLM(run, stride=5))["results"]
    for task in named:
        numbers = [{k: v for k, v in each[task].items() if ",none" in k} for each in (named, other)]
        assert numbers[0] == numbers[1] and numbers[0]


def test_the_command(tasks: Path, run: Path) -> None:
    command = [sys.executable, "-m", "gptfast.lm_eval", "--model", "gptfast"]
    command += ["--model_args", f"path={run}", "--include_path", str(tasks)]
    command += ["--tasks", "gptfast_rolling", "--output_path", str(tasks / "out")]
    command += ["--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [file] = (tasks / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["gptfast_rolling"]["bits_per_byte,none"]
    expected = evaluated(tasks, GptfastLM(run))["results"]["gptfast_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(expected) and "bits_per_byte" in done.stdout
