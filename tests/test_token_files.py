"""Texts in pieces, token files, and training on both."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refused, shown
from small_models import assert_same_weights

from gptfast import checkpoint, data
from gptfast.bpe import BPETokenizer
from gptfast.data import documents, prepare, shuffle, texts, tokens, windows, workers
from gptfast.data.prepare import prepare as prepare_tokens
from gptfast.data.token_files import open_tokens, verify
from gptfast.encoding import Place
from gptfast.errors import ConfigError, DataError
from gptfast.lock import locked
from gptfast.model import GPT
from gptfast.presets import PRESETS
from gptfast.tokenizer import CharTokenizer, text_size
from gptfast.training import Trainer, evaluate, held_out, train

TEXT = data.abc_corpus()[:3000]
LINES = "Die Würde 👩\u200d🚀 des Menschen\nist unantastbar. \n\n  Sie zu achten,\n"
LINES = (LINES + "na\u0308hmlich 東京 42!\n") * 40
SMALL = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 8}
SMALL |= {"steps": 6, "eval_every": 3, "progress": False}
EPOCHS = {"steps": None, "epochs": 1, "batch_size": 256}


@pytest.fixture
def short_pieces(monkeypatch):
    """Cuts texts into pieces of some characters."""
    monkeypatch.setattr(texts, "PIECE", 50)
    monkeypatch.setattr(documents, "JOB", 120)


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The abc text as tokens; its text is beside it."""
    text = written(tmp_path / "abc.txt", TEXT)
    prepare_tokens([text], tmp_path / "tokens", CharTokenizer.from_text(TEXT))
    return tmp_path / "tokens"


# ---- windows of small dtypes


@pytest.mark.parametrize("dtype", windows.TOKEN_DTYPES)
def test_windows_of_all_dtypes_are_those_of_int64(dtype):
    high = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int16: 2**15}.get(dtype, 2**31)
    ids = torch.randint(high, (500,), generator=torch.Generator().manual_seed(1))
    small = ids.to(dtype)
    assert torch.equal(data.as_int64(small), ids)
    for make in (data.random_windows, lambda *args: next(iter(data.EpochWindows(*args)))):
        found = make(small, 16, 8, torch.Generator().manual_seed(2))
        expected = make(ids, 16, 8, torch.Generator().manual_seed(2))
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == torch.int64 and x.is_contiguous() and torch.equal(x, y)


def test_the_dtype_of_a_vocabulary_is_the_smallest_that_holds_it():
    sizes = [1, 256, 257, 2**16, 2**16 + 1]
    assert [tokens.dtype_for(size).name for size in sizes] == [
        *("uint8", "uint8", "uint16", "uint16", "uint32")
    ]


def test_tokens_go_to_a_gpu_only_where_they_take_little_of_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    ids = torch.zeros(1001, dtype=torch.uint8)
    assert data.placed(ids, torch.device("cuda")) is ids
    assert data.placed(ids, torch.device("cpu")) is ids


def test_tokens_of_small_dtypes_train_and_evaluate_alike():
    ids = CharTokenizer.from_text(TEXT).encode_tensor(TEXT)
    options = {name: value for name, value in SMALL.items() if name != "progress"}
    config = PRESETS["abc"].override({**options, "vocab_size": 5})
    found = []
    for each in (ids, ids.to(torch.uint8), ids.to(torch.uint16)):
        model = GPT(config.model, generator=torch.Generator().manual_seed(1))
        result = Trainer(model, config.train).fit(each[:2000], each[2000:])
        found.append([row["val_loss"] for row in result.history])
        assert evaluate(model, each[2000:]).loss == found[-1][-1]
    assert found[0] == found[1] == found[2]


# ---- the order of an epoch


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_an_order_from_a_table_is_that_of_randperm(n):
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    for first in (0, n // 2):
        batches = list(shuffle.shuffled(n, 5, torch.Generator().manual_seed(3), first))
        assert torch.equal(torch.cat(batches), expected[first:])
        assert all(len(batch) == 5 for batch in batches[:-1])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_a_computed_order_has_every_number_once(n, monkeypatch):
    monkeypatch.setattr(shuffle, "MOST_IN_A_TABLE", 0)
    monkeypatch.setattr(shuffle, "BLOCK", 64)
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.cat([*shuffle.shuffled(n, 7, generator)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    assert n < 5 or not torch.equal(first, second)
    again = torch.cat([*shuffle.shuffled(n, 7, torch.Generator().manual_seed(3), 7 * (n // 14))])
    assert torch.equal(again, first[7 * (n // 14) :])


def test_a_computed_order_is_random():
    n = 10_000
    order = shuffle.Permutation(n, torch.Generator().manual_seed(0))(np.arange(n, dtype=np.uint64))
    places = order.astype(np.float64)
    assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.04
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.04
    steps = np.histogram(np.diff(places), 20)[0] / (n - 1)  # of a triangular distribution
    middles = np.abs(np.linspace(-0.95, 0.95, 20))
    np.testing.assert_allclose(steps, (1 - middles) / 10, atol=0.015)


def test_the_order_of_many_windows_takes_no_memory():
    n = 10**13
    batch = next(iter(shuffle.shuffled(n, 1000, torch.Generator().manual_seed(1), n - 1000)))
    assert len(set(batch.tolist())) == 1000 and 0 <= batch.min() < batch.max() < n


# ---- texts in pieces


@pytest.mark.parametrize("size", [1, 2, 3, 50, 10_000])
def test_a_text_is_streamed_whole(tmp_path, monkeypatch, size):
    monkeypatch.setattr(texts, "PIECE", size)
    file = written(tmp_path / "text", "A\ufeff" + LINES)
    pieces = list(texts.stream_text(file))
    assert "".join(pieces) == "A\ufeff" + LINES and all(pieces)


def test_what_is_wrong_in_a_streamed_text_has_its_place(tmp_path, short_pieces):
    file = tmp_path / "text"
    file.write_bytes(b"a" * 149 + "ä".encode() + b"\xe4!")
    with pytest.raises(DataError, match="expected UTF-8, got byte 0xe4 at offset 151"):
        list(texts.stream_text(file))
    file.write_bytes(b"a" * 49 + b"\xe4")  # half a character at the end
    with pytest.raises(DataError, match="byte 0xe4 at offset 49"):
        list(texts.stream_text(file))


def test_texts_are_cut_between_words_if_there_are_any(short_pieces, monkeypatch):
    pieces = list(texts.cut(texts.blocks_of(LINES)))
    assert "".join(pieces) == LINES and len(pieces) > 20
    assert all(piece[0] in "\n " for piece in pieces[1:])
    assert all(piece[-1].isalnum() for piece in pieces[:-1])
    monkeypatch.setattr(texts, "MOST_UNCUT", 100)
    assert [*map(len, texts.cut(texts.blocks_of("x" * 420)))] == [150, 150, 120]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(LINES, 300)


def test_pieces_encode_to_the_tokens_of_the_whole(short_pieces, bpe):
    for tokenizer in (CharTokenizer.from_text(LINES), bpe):
        found = tokens.encoded(tokenizer, texts.blocks_of(LINES))
        assert found.dtype == (torch.uint8 if tokenizer.vocab_size <= 256 else torch.uint16)
        assert data.as_int64(found).tolist() == tokenizer.encode(LINES)
    assert tokens.char_tokenizer(texts.blocks_of(LINES)) == CharTokenizer.from_text(LINES)


def test_a_tokenizer_that_looks_across_cuts_is_refused(short_pieces, bpe):
    class Across(BPETokenizer):
        def encode(self, text, unknown="error"):
            return [len(text)]

    with pytest.raises(DataError, match="other tokens for a text that is cut between"):
        tokens.encoded(Across(bpe.json, bpe.ending), texts.blocks_of(LINES))


def test_an_unknown_character_has_its_place_in_the_whole_text(short_pieces):
    tokenizer = CharTokenizer.from_text(LINES)
    position = LINES.index("42", 2000)
    text = LINES[:position] + "π" + LINES[position:]
    with pytest.raises(DataError) as whole:
        tokenizer.encode(text)
    with pytest.raises(DataError) as pieces:
        tokens.encoded(tokenizer, texts.blocks_of(text))
    assert str(pieces.value) == str(whole.value)
    assert f"'π' at position {position} (line " in str(whole.value)


def test_places_add_up():
    for cut in range(len("ab\nc\n\nd")):
        text = "ab\nc\n\nd"
        assert Place().after(text[cut:]).within(Place().after(text[:cut])) == Place(7, 4, 2)


def test_an_array_grows_beyond_its_segments(monkeypatch):
    monkeypatch.setattr(tokens, "SEGMENT", 64)
    for size in (0, 31, 32, 33, 500):
        grown, values = tokens.Growing(np.dtype(np.uint16)), np.arange(size)
        for part in np.array_split(values, 7):
            grown.append(part)
        assert np.array_equal(grown.whole(), values)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_a_text_takes_at_most_6_bytes_a_character(tmp_path):
    letters = np.frombuffer(b"etaoin shrdlu\nABCDEFG", np.uint8)
    chosen = letters[np.random.default_rng(0).integers(0, len(letters), 10_000_000)]
    chosen.tofile(tmp_path / "text")
    script = Path(__file__).with_name("text_memory.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "text"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        [by, given] for by in ("steps", "epochs") for given in ("data", "text")
    ]
    assert all(float(row[2]) <= 6 for row in rows), done.stdout


# ---- token files


def test_a_folder_has_the_tokens_of_its_texts(tmp_path, bpe, short_pieces):
    parts = [written(tmp_path / name, LINES[start::2]) for start, name in enumerate("ab")]
    for tokenizer in (CharTokenizer.from_text(LINES), bpe):
        out, seen = tmp_path / type(tokenizer).__name__, []
        found = prepare_tokens(parts, out, tokenizer, read=seen.append)
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        expected = [i for start in (0, 1) for i in [*tokenizer.encode(LINES[start::2]), *end]]
        assert data.as_int64(found.ids).tolist() == expected
        assert found.documents == 2 and found.tokenizer == tokenizer
        assert sum(seen) == sum(path.stat().st_size for path in parts)
        content = (out / "tokens.bin").read_bytes()
        assert found.sha256 == hashlib.sha256(content).hexdigest()
        meta = json.loads((out / "meta.json").read_text())
        assert (meta["dtype"], meta["tokens"]) == (str(found.ids.dtype)[6:], len(expected))
        assert sorted(path.name for path in out.iterdir()) == ["meta.json", "tokens.bin"]
        verify(open_tokens(out))


def test_processes_do_not_change_the_tokens(tmp_path, bpe, short_pieces):
    file = written(tmp_path / "text", LINES)
    one = prepare_tokens([file], tmp_path / "one", bpe)
    two = prepare_tokens([file], tmp_path / "two", bpe, processes=2)
    assert two.sha256 == one.sha256 and two.documents == one.documents == 1


def test_a_process_that_is_killed_is_one_sentence():
    with pytest.raises(DataError, match="a process that encoded texts was ended from outside"):
        list(workers.mapped(os._exit, [1, 1, 1], 1))
    assert multiprocessing.active_children() == []


def test_what_a_process_could_not_do_is_told() -> None:
    with pytest.raises(DataError, match=r"a text cannot be encoded \(ZeroDivisionError: "):
        list(workers.mapped(divided_by_zero, [1], 1))


def divided_by_zero(x: int) -> float:
    return x / 0


def test_a_process_sends_back_what_went_wrong():
    ours, theirs = multiprocessing.Pipe()
    encode = CharTokenizer.from_text("AB").encode
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(workers._serve, encode, theirs)
        ours.send("ABA")
        assert ours.recv() == [1, 2, 1]
        ours.send("A\nπ")
        with pytest.raises(DataError, match=r"'\\n' at position 1 \(line 1, column 2\)") as caught:
            raise ours.recv()
        assert "position 11 (line 2, column 3)" in str(caught.value.within(Place(10, 2, 2)))
        ours.close()
        assert serving.result() is None


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a b\nc\n---\nd\n", "---", ["a b\nc\n", "d\n"]),
        ("---\n---\r\na\r\n---\r\n--- b\n ---\nc---\n---", "---", ["a\r\n", "--- b\n ---\nc---\n"]),
        ("a\n\n\nb\n\nc", "", ["a\n", "b\n", "c"]),
        ("a---\n---b\n--", "---", ["a---\n---b\n--"]),
        ("long line without an end ---", "---", ["long line without an end ---"]),
    ],
)
def test_lines_separate_documents(tmp_path, monkeypatch, size, text, separator, expected):
    monkeypatch.setattr(texts, "PIECE", size)
    found, document = [], ""
    for part in documents.parts(written(tmp_path / "text", text), separator):
        document += part.text
        if part.ends:
            found.append(document)
            document = ""
    assert found == expected and document == ""


def test_a_file_of_separators_has_no_document(tmp_path):
    file = written(tmp_path / "text", "---\n---\n")
    with pytest.raises(DataError, match="text: the file has nothing but separators"):
        prepare_tokens([file], tmp_path / "out", CharTokenizer.from_text("-\n"), separator="---")


def test_an_unknown_character_names_its_document(tmp_path, short_pieces):
    file = written(tmp_path / "text", LINES)
    tokenizer = CharTokenizer.from_text(LINES.replace("2", ""))
    with pytest.raises(DataError, match=r"text: character '2' at position 77 \(line 5, col"):
        prepare_tokens([file], tmp_path / "bad", tokenizer)
    assert not (tmp_path / "bad").exists()
    file = written(tmp_path / "text", "A\n---\nAB\nAπ\n")
    with pytest.raises(DataError, match=r"text, document 2: character 'π' at position 4 \(line 2"):
        prepare_tokens([file], tmp_path / "out", CharTokenizer.from_text("AB\n"), separator="---")


def test_what_fails_leaves_the_folder_as_it_was(tmp_path, folder, monkeypatch):
    text, tokenizer = tmp_path / "abc.txt", CharTokenizer.from_text(TEXT)
    with pytest.raises(DataError, match="tokens: holds tokens already"):
        prepare_tokens([text], folder, tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_encode", interrupted)
        for out in (folder, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                prepare_tokens([text], out, tokenizer, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
    with locked(folder / ".lock"), pytest.raises(DataError, match="other tokens are being prep"):
        prepare_tokens([text], folder, tokenizer, overwrite=True)
    (folder / "tokens.bin.tmp").write_bytes(b"of a process that was killed")
    old = open_tokens(folder)
    new = prepare_tokens([text, text], folder, tokenizer, overwrite=True)
    assert len(new.ids) == 2 * len(old.ids) == 2 * len(TEXT)
    assert data.as_int64(old.ids).tolist() == tokenizer.encode(TEXT)  # still mapped
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "tokens.bin"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "meta.json").unlink(), "no folder of tokens, it has no meta.json, which"),
        (lambda f: (f / "tokens.bin").unlink(), "tokens.bin: cannot be read"),
        (lambda f: (f / "tokens.bin").write_bytes(b"1"), "expected 3,000 bytes .* got 1: prep"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json: damaged"),
        (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json: damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "not the description of a token file"),
        (lambda f: edit(f, version=9), "version 9, this gptfast reads 1"),
        (lambda f: edit(f, dtype="uint16"), "damaged .*dtype uint16 for 5 ids"),
        (lambda f: edit(f, dtype="colour"), "meta.json: damaged"),
        (lambda f: edit(f, tokens="many"), "meta.json: damaged"),
        (lambda f: edit(f, tokenizer={}), "expected a tokenizer"),
    ],
)
def test_a_damaged_folder_is_one_sentence(folder, damage, expected):
    damage(folder)
    for use in (open_tokens, lambda path: train("abc", data=path, **SMALL)):
        with pytest.raises(DataError, match=expected) as caught:
            use(folder)
        assert "\n" not in str(caught.value)


def edit(folder: Path, **values: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | values))


def test_verify_finds_a_changed_byte(folder):
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[1234] ^= 1
    (folder / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match="tokens.bin: damaged: expected sha256"):
        verify(open_tokens(folder))


# ---- training on them


@pytest.mark.parametrize("options", [{}, EPOCHS])
def test_a_folder_trains_to_the_bits_of_its_text(tmp_path, folder, options):
    for name, source in (("file", tmp_path / "abc.txt"), ("tokens", folder)):
        train("abc", tmp_path / name, data=source, **(SMALL | options))
    assert_same_weights(*(checkpoint.load(tmp_path / name)[0] for name in ("tokens", "file")))
    assert torch.equal(held_out(tmp_path / "tokens"), held_out(tmp_path / "file"))


def test_a_run_knows_its_folder_by_the_hash(tmp_path, folder):
    out = tmp_path / "run"
    train("abc", out, data=folder, **SMALL)
    train("abc", out, data=folder, resume=True, **(SMALL | {"steps": 9}))
    whole = train("abc", data=folder, **(SMALL | {"steps": 9}))
    assert_same_weights(checkpoint.load(out)[0], whole.model)
    prepare_tokens(
        [written(tmp_path / "other", TEXT[::-1])],
        folder,
        CharTokenizer.from_text(TEXT),
        overwrite=True,
    )
    with pytest.raises(ConfigError, match="the run was started with another text"):
        train("abc", out, data=folder, resume=True, **(SMALL | {"steps": 12}))
    with pytest.raises(DataError, match="tokens is no longer the text that it was trained on"):
        held_out(out)


def test_a_folder_comes_with_its_tokenizer(tmp_path, folder, bpe):
    with pytest.raises(ConfigError, match="tokens: its tokens are those of another tokenizer"):
        train("abc", data=folder, tokenizer=CharTokenizer.from_text("ABC\nx"), **SMALL)
    train("abc", tmp_path / "run", data=folder, **SMALL)
    result = train("abc", data=folder, init_from=tmp_path / "run", **SMALL)
    assert result.tokenizer == CharTokenizer.from_text(TEXT)
    out = tmp_path / "bpe"
    prepare_tokens([written(tmp_path / "text", LINES)], out, bpe)
    result = train("abc", data=out, **SMALL)
    assert result.tokenizer == bpe and result.model.config.padding_idx is None


def test_text_size_counts_in_parts(monkeypatch, bpe):
    monkeypatch.setattr("gptfast.tokenizer.COUNTED_AT_ONCE", 100)
    ids = torch.tensor(bpe.encode(LINES)).to(torch.uint16)
    assert text_size(bpe, ids) == (len(LINES), len(LINES.encode("utf-8")), 0)


# ---- the command line


def test_the_commands_prepare_train_and_evaluate(tmp_path, capsys):
    text, out, path = written(tmp_path / "text", LINES), tmp_path / "tokens", tmp_path / "run"
    bpe = ["--tokenizer=bpe", "--vocab-size=280"]
    printed = shown(capsys, "data", "prepare", text, text, "--out", out, *bpe)
    assert "of a vocabulary of 280\ndocuments   2\n" in printed
    assert shown(capsys, "data", "check", out) == printed
    options = ["--model.n-layer=1", "--model.n-embd=16", "--train.steps=2"]
    shown(capsys, "train", "abc", "--data", out, "--out", path, *options)
    held = shown(capsys, "eval", path)
    assert all(unit in held for unit in ("nats per token", "per character", "per byte"))
    whole = shown(capsys, "eval", path, "--data", out)
    again = tmp_path / "again"
    shown(capsys, "data", "prepare", text, "--out", again, "--tokenizer", path)
    assert open_tokens(again).tokenizer == open_tokens(out).tokenizer
    assert whole != shown(capsys, "eval", path, "--data", again)
    error = refused(capsys, "eval", path, "--data", text.parent)
    assert "no folder of tokens" in error


def test_mistakes_of_data_are_one_sentence(tmp_path, capsys):
    text, out = written(tmp_path / "text", "AB\n"), tmp_path / "out"
    for arguments, expected in (
        (["teach"], "there is no data 'teach'; there are abc, shakespeare, prepare, check"),
        (["prepare", text], "Missing"),
        (["prepare", "--out", out], "there is no text to prepare"),
        (["prepare", tmp_path / "no", "--out", out], "no: no such file"),
        (["prepare", text, "--out", text], "text: expected a folder for the tokens, got a file"),
        (["prepare", text, "--out", out, "--tokenizer", "bpe"], "--vocab-size N belongs to"),
        (["prepare", text, "--out", out, "--vocab-size", "9"], "--vocab-size N belongs to"),
        (["prepare", text, "--out", out, "--tokenizer", tmp_path / "no"], "no"),
        (["prepare", text, "--out", out, "--processes", "-1"], "processes must be a whole number"),
        (["check", tmp_path], "no folder of tokens"),
    ):
        assert expected in refused(capsys, "data", *arguments)
    assert not out.exists()
