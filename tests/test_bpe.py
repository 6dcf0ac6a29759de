"""Byte-pair encoding: texts come back whole, in files, checkpoints, training and generation."""

import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import model_of, small_model

import gptfast
from gptfast import GPT, BPETokenizer, CharTokenizer, ConfigError, DataError, GPTConfig, bpe, cli
from gptfast.bpe_files import BYTE_SYMBOLS, END_OF_TEXT
from gptfast.generation import make_request
from gptfast.generation.api import _generations, _PendingText
from gptfast.generation.sequences import Update
from gptfast.tokenizer import Tokenizer, from_dict, text_size

LINE = "It's the café's façade — naïve, e\u0301 and 🤗👩\u200d👩\u200d👧 12 345!"
TEXT = f"{LINE}\n\n  The cat sat on the mat.\n" * 20
V = 310
TOKENIZER = BPETokenizer.train(TEXT, V)
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))
BACKENDS = ("auto", "reference")


STORED = json.loads(TOKENIZER.json)["model"]


def changed(**parts: Any) -> dict[str, Any]:
    """The tokenizer.json of TOKENIZER with other parts."""
    return json.loads(TOKENIZER.json) | parts


def random_model(**options: Any) -> GPT:
    vocab_size = TOKENIZER.vocab_size + 3
    config = GPTConfig(block_size=16, vocab_size=vocab_size, n_embd=32, padding_idx=None, **options)
    return model_of(config, seed=1).eval()


MODEL = random_model()


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text_comes_back_whole(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and TOKENIZER.end_of_text not in ids
    assert TOKENIZER.encode_tensor(text).tolist() == ids
    assert TOKENIZER.encode_tensor(text).dtype == torch.int64
    assert b"".join(TOKENIZER.pieces[i] for i in ids).decode() == text
    size = text_size(TOKENIZER, torch.tensor(ids, dtype=torch.int64))
    assert size == (len(text), len(text.encode()), 0)


@given(ANY_TEXT, st.integers(1, 9))
@settings(deadline=None)
def test_a_text_in_parts_has_the_tokens_of_the_whole(text: str, most: int) -> None:
    text = f"{text} {TEXT[:99]}{text}\n{text}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "CHARACTERS_AT_ONCE", most)
        patch.setattr(bpe, "PARTS_AT_ONCE", 3)
        assert len([*bpe._parts(text)]) > 5
        assert TOKENIZER.encode(text) == TOKENIZER._encoder.encode(text).ids


def test_ids_are_the_end_the_bytes_and_what_was_learnt() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.end_of_text, TOKENIZER.unit) == (V, 0, "token")
    assert sorted(TOKENIZER.pieces[1:257]) == [bytes([i]) for i in range(256)]
    assert b" the" in TOKENIZER.pieces and "é".encode() in TOKENIZER.pieces
    assert BPETokenizer.train(iter([TEXT, "", TEXT]), V).pieces[0] == b""
    assert BPETokenizer.train(TEXT, V) == TOKENIZER
    assert BPETokenizer.train("ab", 1000, ending=None).vocab_size == 257


def test_special_tokens_are_ids_alone() -> None:
    text = f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode([0, *TOKENIZER.encode("a"), 0]) == "a"
    assert BYTE_SYMBOLS[ord("Ġ")] == " "


def test_what_cannot_be_encoded_or_decoded() -> None:
    with pytest.raises(DataError, match=r"'\\ud83d' at position 2 .line 2, column 1. is half of a"):
        TOKENIZER.encode("a\n\ud83d")
    assert TOKENIZER.encode("a\ud83db", "skip") == TOKENIZER.encode("ab")
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        TOKENIZER.encode("a", "ignore")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="id 310 is out of range: expected 0 to 309"):
        TOKENIZER.decode([V])
    half = TOKENIZER.encode("\N{MELTING FACE}")[:2]  # not among the texts: a token per byte
    assert TOKENIZER.decode([*half, *TOKENIZER.encode("a")]) == "\ufffda"


@pytest.mark.parametrize(
    ("texts", "size", "error", "message"),
    [
        (TEXT, 256, ConfigError, "vocab_size must be a whole number from 257 to .*, got 256"),
        (
            TEXT,
            None,
            ConfigError,
            "vocab_size must be a whole number from 257 to .*, got None",
        ),
        ("", 300, DataError, "a vocabulary cannot be made from an empty text"),
        ([], 300, DataError, "a vocabulary cannot be made from an empty text"),
        ([b"a"], 300, TypeError, "text must be a str, got bytes"),
        (["a", "\ud83d"], 300, DataError, "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_learnt(texts: Any, size: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        BPETokenizer.train(texts, size)


def test_what_a_vocabulary_cannot_have() -> None:
    with pytest.raises(ConfigError, match="vocab_size must be a whole number from 257 to"):
        BPETokenizer.train(TEXT, 10**9)
    for ending in ("a", "\u0120", "cat"):  # a byte, the space's symbol, and what is merged
        with pytest.raises(ConfigError, match="ending must be a text that words do not have"):
            BPETokenizer.train("cat " * 50, 300, ending)
    for ending in (5, "\ud800"):
        with pytest.raises(ConfigError, match="ending must be a text or None, got"):
            BPETokenizer.train(TEXT, 300, ending)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="ending must be a text or None, got"):
        BPETokenizer(TOKENIZER.json, ending=["x"])  # type: ignore[arg-type]
    for path in (None, "a\0b", "a" * 5000):
        with pytest.raises(ConfigError, match="the tokenizer must be the path of a file"):
            BPETokenizer.load(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("i", (5, 400))
def test_added_tokens_have_the_ids_that_the_library_gives(i: int) -> None:
    """It takes the next free id where the declared one is taken or leaves a gap."""
    content = json.loads(TOKENIZER.json)
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": i, "content": "ello", **flags})
    with pytest.raises(DataError, match=f"gives 'ello' the id {V}, not {i}"):
        BPETokenizer(json.dumps(content)).encode("hello")
    content["added_tokens"][-1]["id"] = V
    tokenizer = BPETokenizer(json.dumps(content))
    assert tokenizer.decode(tokenizer.encode("hello!")) == "hello!"
    content["added_tokens"][-1]["content"] = {}
    with pytest.raises(DataError, match="an added token is a dict, expected a text"):
        BPETokenizer(json.dumps(content))


def test_tokens_outside_of_the_bytes_alphabet_are_written_as_they_are() -> None:
    content = json.loads(TOKENIZER.json)
    content["model"]["vocab"] |= {"\xad": V, "\u0120 x": V + 1}
    tokenizer = BPETokenizer(json.dumps(content))
    assert tokenizer.decode([V]) == "\xad" and tokenizer.decode([V + 1]) == "\u0120 x"


def test_a_dict_a_pickle_and_files_give_it_back(tmp_path: Path) -> None:
    stored = json.loads(json.dumps(TOKENIZER.to_dict()))
    assert from_dict(stored) == TOKENIZER == pickle.loads(pickle.dumps(TOKENIZER))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(truncation={"max_length": 2}, padding={"pad_id": 1})))
    assert BPETokenizer.load(file) == TOKENIZER == BPETokenizer.load(tmp_path)
    assert BPETokenizer.load(file, ending=END_OF_TEXT) == TOKENIZER
    char = CharTokenizer.from_text("ab")
    assert from_dict(char.to_dict()) == char


def gpt2_files(folder: Path) -> None:
    """Writes TOKENIZER as GPT-2's files."""
    model = json.loads(TOKENIZER.json)["model"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def test_gpt2s_files_in_a_folder_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"gpt2: its tokenizer is not in {tmp_path}/hub, and noth"):
        BPETokenizer.load("gpt2")
    folder = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / "0"
    gpt2_files(folder)
    for source in ("gpt2", folder):
        found = BPETokenizer.load(source)
        assert found.encode(TEXT) == TOKENIZER.encode(TEXT)
        assert (found.pieces, found.end_of_text) == (TOKENIZER.pieces, TOKENIZER.end_of_text)
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match="0: no tokenizer, it has no tokenizer.json or vocab.json"):
        BPETokenizer.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"not the tokenizer.json of a byte-pair encoding \(JSONDecodeError"),
        ([1], "not the tokenizer.json of a byte-pair encoding .TypeError"),
        ({"vocab": {}}, "not the tokenizer.json of a byte-pair encoding .KeyError: 'model'"),
        (changed(model={"type": "WordPiece", "vocab": {"a": 0}}), "of the kind 'WordPiece'"),
        (changed(pre_tokenizer={"type": "Metaspace"}), "expected a byte-level tokenizer"),
        (changed(model={"type": "BPE", "vocab": {"a": 0}}), "each of the 256 bytes, got none"),
        (changed(model={"type": "BPE", "vocab": {"a": -1}}), "a token has id -1, expected one"),
        (
            changed(model=STORED | {"merges": [["a"]]}),
            r"expected merges of two tokens each \(ValueError",
        ),
        (changed(normalizer={"type": "None"}), "the library tokenizers refuses the tokenizer"),
    ],
)
def test_files_that_hold_no_such_tokenizer(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        BPETokenizer.load(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="expected a tokenizer of the form {'kind': 'bpe'"):
        from_dict({"kind": "bpe", "json": 1})
    with pytest.raises(DataError, match="has no special token '</s>'"):
        replace(TOKENIZER, ending="</s>")


def test_without_the_library_checkpoints_load_and_texts_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptfast.save(MODEL, TOKENIZER, tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    model, tokenizer = gptfast.load(tmp_path)
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5}
    assert gptfast.generate(model, [[1]], **options)[0].text
    for call in (
        lambda: gptfast.generate(model, ["a"], **options),
        lambda: BPETokenizer.train(TEXT, V),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'gptfast-kernels\[bpe\]'$"):
            call()


@given(st.lists(st.integers(0, V - 1), max_size=30), st.data())
@settings(deadline=None, max_examples=60)
def test_a_stream_never_gives_half_a_character(tokens: list[int], data: st.DataObject) -> None:
    stops = data.draw(st.lists(st.sampled_from(["🤗", " the", "a\u0301", "e", "ï"]), max_size=2))
    request = make_request(MODEL, ["a"], tokenizer=TOKENIZER, stop=stops)
    written = b"".join(TOKENIZER.pieces[i] for i in tokens)
    state = "stop" if any(stop in written for stop in request.stop_strings) else "length"
    (whole,) = _generations([Update(0, state, tokens, [0.0] * len(tokens), [])], request)
    assert whole.pieces is not None and len(whole.pieces) == len(whole.tokens)
    assert b"".join(whole.pieces).decode("utf-8", "replace") == whole.text
    pending, streamed, start = _PendingText(request), [], 0
    while start < len(tokens):
        end = min(start + data.draw(st.integers(1, 4)), len(tokens))
        now = "running" if end < len(tokens) else state
        if now == "running" and any(
            stop in b"".join(TOKENIZER.pieces[i] for i in tokens[:end])
            for stop in request.stop_strings
        ):
            now, end = state, len(tokens)
        streamed.append(pending.next_piece(Update(0, now, tokens[start:end], [], [])))
        start = end
    assert "".join(map(str, streamed)) == whole.text
    if state == "length":
        assert whole.text == written.decode("utf-8", "replace")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_random_model_streams_what_it_generates(backend: Any) -> None:
    model = random_model()
    model.backend = backend
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": 25, "seed": 3}
    (whole,) = gptfast.generate(model, ["café"], **options)
    assert whole.text == TOKENIZER.decode([t for t in whole.tokens if t < V])
    assert "\ufffd" in whole.text
    assert "".join(map(str, gptfast.stream(model, "café", **options))) == whole.text


OPTIONS: dict[str, Any] = {
    "n_layer": 1, "n_embd": 32, "block_size": 32, "dropout": 0.0,
    "steps": 150, "lr": 1e-2, "batch_size": 16, "val_fraction": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model knows TEXT by heart."""
    path = tmp_path_factory.mktemp("bpe") / "run"
    path.with_suffix(".txt").write_text(TEXT, encoding="utf-8")
    gptfast.train(
        "abc", path, data=path.with_suffix(".txt"), tokenizer=TOKENIZER, progress=False, **OPTIONS
    )
    return path


def test_a_run_keeps_its_tokenizer(run: Path) -> None:
    model, tokenizer = gptfast.load(run)
    assert tokenizer == TOKENIZER and model.config.vocab_size == V
    assert model.config.padding_idx is None
    data = run.with_suffix(".txt")
    again = gptfast.train("abc", run, data=data, resume=True, progress=False, **OPTIONS)
    assert again.tokenizer == TOKENIZER


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop", ["at sat", "👩‍👩", "\n\n", "ve, e", "🤗"])
def test_a_stop_is_cut_where_it_begins(run: Path, stop: str, backend: Any) -> None:
    model, tokenizer = gptfast.load(run)
    assert tokenizer is not None
    model.backend = backend
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 70, "temperature": 0}
    (free,) = gptfast.generate(model, ["It's"], **options)
    assert free.text is not None and free.text.rstrip("\ufffd") in TEXT and stop in free.text
    (stopped,) = gptfast.generate(model, ["It's"], stop=["never there", stop], **options)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    count = len(stopped.tokens)
    assert stopped.tokens == free.tokens[:count] and len(stopped.logprobs) == count
    shorter, written = (
        b"".join(TOKENIZER.pieces[t] for t in free.tokens[:n]) for n in (count - 1, count)
    )
    assert len(shorter) < len(stopped.text.encode()) and written.startswith(stopped.text.encode())
    assert "".join(map(str, gptfast.stream(model, "It's", stop=stop, **options))) == stopped.text


def test_bits_per_character_and_per_byte(run: Path, capsys: Any, tmp_path: Path) -> None:
    model, tokenizer = gptfast.load(run)
    text = "The café 🤗"
    (scored,) = gptfast.score(model, [text], tokenizer=tokenizer)
    after = TOKENIZER.decode(scored.tokens[1:])
    assert (scored.characters, scored.utf8_bytes) == (len(after), len(after.encode()))
    bits = -scored.logprob / math.log(2)
    assert scored.bits_per_byte == pytest.approx(bits / len(after.encode()))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert cli.main(["eval", str(run), "--data", str(file)]) == 0
    out = capsys.readouterr().out
    assert "nats per token" in out and f"tokens      {len(scored.tokens) - 1}\n" in out
    for unit in ("character", "byte"):
        assert f"bits        {getattr(scored, f'bits_per_{unit}'):.4f} per {unit}\n" in out


def test_the_commands_take_it(run: Path, capsys: Any, tmp_path: Path) -> None:
    options = ["--max-new-tokens", "60", "--temperature", "0"]
    assert cli.main(["generate", str(run), "--prompt", "It's", *options, "--stop", " sat"]) == 0
    out = capsys.readouterr().out
    assert out == TEXT[: TEXT.index(" sat")] + "\n"
    assert cli.main(["generate", str(run), "--prompt", "", *options, "--no-stop-at-end"]) == 0
    assert cli.main(["eval", str(run)]) == 0
    picture = tmp_path / "a.png"
    texts = ["--attention", "The café 🤗", "--plot", str(picture)]
    assert cli.main(["inspect", str(run), *texts]) == 0
    out = capsys.readouterr().out
    assert "BPETokenizer(vocab_size=310, end_of_text=0)" in out and "␣caf" in out
    assert picture.stat().st_size > 0


class Ending(CharTokenizer):
    """A tokenizer whose texts end with a line break."""

    end_of_text = 1  # type: ignore[assignment]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_ends_at_the_end_of_texts(backend: Any) -> None:
    tokenizer: Tokenizer = Ending(tuple("\nabc"))
    model = small_model(n_layer=2)
    model.backend = backend
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 50}
    (free,) = gptfast.generate(model, ["a"], stop_at_end=False, **options)
    assert free.text is not None and "\n" in free.text and free.finish_reason == "length"
    ends = gptfast.generate(model, ["a"], **options)
    ends += gptfast.generate(model, ["a"], stop=["never there", 1], **options)
    for ended in ends:
        assert ended.text == free.text[: free.text.index("\n")] and ended.finish_reason == "end"
        assert ended.tokens == free.tokens[: len(ended.text)]
    assert "".join(map(str, gptfast.stream(model, "a", **options))) == ends[0].text
    (stopped,) = gptfast.generate(model, ["a"], stop=1, stop_at_end=False, **options)
    assert stopped.text == ends[0].text and stopped.finish_reason == "stop"
    (begun,) = gptfast.generate(model, [""], **options)
    assert begun == gptfast.generate(model, [[1]], **options)[0]
    with pytest.raises(DataError, match="text 0 is empty"):
        gptfast.score(model, [""], tokenizer=tokenizer)
