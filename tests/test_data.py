import hashlib
import itertools
import math
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from gptfast import data
from gptfast.abc_corpus import PROBABILITIES, WORDS, _r_uniforms
from gptfast.errors import DataError

# ---- abc: the corpus


def test_uniforms_are_those_of_r():
    # R: set.seed(1); runif(3) and set.seed(42); runif(2)
    np.testing.assert_allclose(_r_uniforms(1, 3), [0.2655087, 0.3721239, 0.5728534], atol=5e-8)
    np.testing.assert_allclose(_r_uniforms(42, 2), [0.9148060, 0.9370754], atol=5e-8)


def test_abc_corpus_has_the_registered_bytes():
    text = data.abc_corpus()
    corpus = data.CORPORA["abc"]
    assert len(text.encode()) == corpus.num_bytes == 1_079_918
    assert hashlib.sha256(text.encode()).hexdigest() == corpus.sha256


def test_abc_corpus_depends_on_the_seed():
    assert data.abc_corpus(2) != data.abc_corpus(1)
    assert data.abc_corpus(-1) == data.abc_corpus(2**32 - 1)
    with pytest.raises(DataError, match="32-bit integer, got 4294967296"):
        data.abc_corpus(2**32)


# ---- abc: the true distribution


def block_probabilities(length: int) -> Counter[str]:
    """P(text of `length` characters) by writing out all word sequences; the tests' own way."""
    mean_length = sum(p * len(word) for p, word in zip(PROBABILITIES, WORDS, strict=True))
    found: Counter[str] = Counter()

    def extend(text: str, probability: float) -> None:
        if len(text) >= length:
            found[text[:length]] += probability
            return
        for p, word in zip(PROBABILITIES, WORDS, strict=True):
            extend(text + word, probability * p)

    for p, word in zip(PROBABILITIES, WORDS, strict=True):
        for start in range(len(word)):
            extend(word[start:], p / mean_length)
    return found


def test_next_distribution_after_a():
    p = data.abc_next_distribution("A")
    assert {char: round(value, 3) for char, value in p.items()} == {
        "\n": 0.0,
        "A": 0.436,
        "B": 0.436,
        "C": 0.127,
    }


@pytest.mark.parametrize("length", [0, 1, 2, 5, 9])
def test_next_distribution_equals_ratios_of_block_probabilities(length):
    shorter, longer = block_probabilities(length), block_probabilities(length + 1)
    for context, probability in shorter.items():
        p = data.abc_next_distribution(context)
        for char in "\nABC":
            assert p[char] == pytest.approx(longer[context + char] / probability, abs=1e-12)


def test_next_distribution_is_that_of_the_corpus():
    text = data.abc_corpus()
    after = Counter(text[i + 3] for i in range(len(text) - 3) if text.startswith("BCA", i))
    for char, p in data.abc_next_distribution("BCA").items():
        assert after[char] / after.total() == pytest.approx(p, abs=0.003)


def test_impossible_context_is_an_error():
    assert data.abc_next_distribution("CAAACB") == {"\n": 1.0, "A": 0.0, "B": 0.0, "C": 0.0}
    with pytest.raises(DataError, match="cannot give 'A' at position 4"):
        data.abc_next_distribution("CAAAA")
    with pytest.raises(DataError, match="cannot give 'x' at position 1"):
        data.abc_next_distribution("Ax")


def test_entropy_equals_differences_of_block_entropies():
    def entropy(length: int) -> float:
        return -sum(p * math.log(p) for p in block_probabilities(length).values())

    steps = [entropy(n + 1) - entropy(n) for n in range(1, 17)]
    for n in (1, 4, 16):
        assert data.abc_entropy(n) == pytest.approx(sum(steps[:n]) / n, abs=1e-10)


def test_entropy_over_16_contexts():
    assert data.abc_entropy() == pytest.approx(0.258584, abs=1e-6)
    with pytest.raises(DataError, match="max_context must be a whole number, at least 1, got 0"):
        data.abc_entropy(0)


def test_true_distribution_scores_the_corpus_at_the_entropy():
    text = data.abc_corpus()
    seen = Counter(text[i : i + 17] for i in range(len(text) - 17))
    p = {}
    for window in seen:
        for n in range(1, 17):
            if window[: n + 1] not in p:
                p[window[: n + 1]] = data.abc_next_distribution(window[:n])[window[n]]
    loss = -sum(
        count * math.log(p[window[: n + 1]]) for window, count in seen.items() for n in range(1, 17)
    )
    assert loss / (16 * seen.total()) == pytest.approx(data.abc_entropy(), abs=5e-4)


# ---- files


def test_read_text_keeps_the_bytes(tmp_path):
    file = tmp_path / "text"
    file.write_bytes("Zeile\r\nnächste\n".encode())
    assert data.read_text(file) == "Zeile\r\nnächste\n"
    assert data.read_text(str(file)) == "Zeile\r\nnächste\n"


def test_a_byte_order_mark_is_no_character_of_the_text(tmp_path):
    file = tmp_path / "text"
    mark = b"\xef\xbb\xbf"
    file.write_bytes(mark + "A\ufeffB".encode())
    assert data.read_text(file) == "A\ufeffB"  # elsewhere it is one
    file.write_bytes(mark)
    with pytest.raises(DataError, match="text: the file is empty but for a byte order mark"):
        data.read_text(file)
    file.write_bytes(mark + b"A\xff")
    with pytest.raises(DataError, match="got byte 0xff at offset 4"):
        data.read_text(file)
    file.write_bytes("A".encode("utf-16"))
    with pytest.raises(DataError, match="expected UTF-8, got byte 0xff at offset 0"):
        data.read_text(file)


def test_read_text_errors_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="absent: no such file"):
        data.read_text(tmp_path / "absent")
    with pytest.raises(DataError, match="expected a text file, got a directory"):
        data.read_text(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty: the file is empty"):
        data.read_text(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"abc\xff\x00")
    with pytest.raises(DataError, match="expected UTF-8, got byte 0xff at offset 3"):
        data.read_text(tmp_path / "binary")


# ---- shakespeare


@pytest.fixture
def own_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTFAST_DATA_DIR", str(tmp_path / "corpora"))
    return tmp_path / "corpora"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A web server on this machine that serves the folder that the fixture returns."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    no_proxy(monkeypatch)
    url = f"http://127.0.0.1:{server.server_port}"
    set_urls(monkeypatch, f"{url}/missing.txt", f"{url}/input.txt")
    yield folder
    server.shutdown()
    server.server_close()


def no_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def set_urls(monkeypatch, *urls):
    known = data.CORPORA["shakespeare"]
    changed = data.Corpus(known.name, known.file_name, known.num_bytes, known.sha256, urls)
    monkeypatch.setitem(data.CORPORA, "shakespeare", changed)


def test_registry_matches_the_file(shakespeare_path):
    corpus = data.CORPORA["shakespeare"]
    content = shakespeare_path.read_bytes()
    assert len(content) == corpus.num_bytes
    assert hashlib.sha256(content).hexdigest() == corpus.sha256


def test_shakespeare_from_a_file(shakespeare_path, shakespeare_text, own_data_dir):
    assert data.shakespeare(shakespeare_path) == shakespeare_text
    assert not own_data_dir.exists()


def test_shakespeare_from_the_data_dir(shakespeare_path, shakespeare_text, own_data_dir):
    own_data_dir.mkdir()
    (own_data_dir / "shakespeare.txt").write_bytes(shakespeare_path.read_bytes())
    assert data.shakespeare() == shakespeare_text


def test_shakespeare_is_downloaded_once_from_the_first_source_that_has_it(
    shakespeare_path, shakespeare_text, own_data_dir, served, monkeypatch
):
    (served / "input.txt").write_bytes(shakespeare_path.read_bytes())
    assert data.shakespeare() == shakespeare_text
    assert (own_data_dir / "shakespeare.txt").read_bytes() == shakespeare_path.read_bytes()
    set_urls(monkeypatch)
    assert data.shakespeare() == shakespeare_text


def test_download_of_another_text_is_refused_and_leaves_nothing(own_data_dir, served):
    (served / "input.txt").write_text("To be, or not")
    with pytest.raises(DataError, match="could not be downloaded.*HTTPError.*ValueError"):
        data.shakespeare()
    assert list(own_data_dir.iterdir()) == []


def test_no_network_is_one_sentence_that_names_the_alternatives(own_data_dir, monkeypatch):
    no_proxy(monkeypatch)
    set_urls(monkeypatch, "http://127.0.0.1:9/input.txt")  # port 9: nobody listens
    with pytest.raises(DataError) as caught:
        data.shakespeare()
    message = str(caught.value)
    assert "127.0.0.1:9: ConnectionError" in message
    assert "--from FILE" in message and "GPTFAST_DATA_DIR" in message and "\n" not in message


def test_another_text_in_place_of_shakespeare_is_refused_and_kept(tmp_path, own_data_dir):
    own_data_dir.mkdir()
    other = own_data_dir / "shakespeare.txt"
    other.write_text("To be, or not")
    for source in (None, other):
        with pytest.raises(DataError, match="expected 1,115,394 bytes .* got 13 bytes"):
            data.shakespeare(source)
    assert other.read_text() == "To be, or not"
    with pytest.raises(DataError, match="no such file"):
        data.shakespeare(tmp_path / "absent.txt")


def test_data_dir_without_the_variable_is_the_users_cache(monkeypatch):
    monkeypatch.delenv("GPTFAST_DATA_DIR", raising=False)
    assert data.data_dir().name == "gptfast"
    monkeypatch.setenv("GPTFAST_DATA_DIR", "~/texts")
    assert data.data_dir().is_absolute() and data.data_dir().name == "texts"


# ---- windows


def test_random_windows_are_slices_with_targets_one_further():
    ids = torch.randperm(1000)
    x, y = data.random_windows(ids, 16, 64, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (64, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    place = torch.argsort(ids)
    for inputs, targets in zip(x, y, strict=True):
        start = place[inputs[0]]
        assert torch.equal(inputs, ids[start : start + 16])
        assert torch.equal(targets, ids[start + 1 : start + 17])


def test_random_windows_reach_every_start_and_repeat_by_seed():
    ids = torch.arange(10)
    x, y = data.random_windows(ids, 3, 2000, torch.Generator().manual_seed(0))
    counts = Counter(x[:, 0].tolist())
    assert sorted(counts) == list(range(7)) and y.max() == 9
    assert min(counts.values()) > 200
    again, _ = data.random_windows(ids, 3, 2000, torch.Generator().manual_seed(0))
    other, _ = data.random_windows(ids, 3, 2000, torch.Generator().manual_seed(1))
    assert torch.equal(x, again) and not torch.equal(x, other)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_an_epoch_has_every_window_once(batch_size):
    ids = torch.arange(20)
    windows = data.EpochWindows(ids, 5, batch_size, torch.Generator().manual_seed(0))
    batches = list(windows)
    assert len(batches) == len(windows) == math.ceil(15 / batch_size)
    assert all(len(x) == batch_size for x, _ in batches[:-1])
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    assert sorted(x[:, 0].tolist()) == list(range(15))
    assert torch.equal(x, x[:, :1] + torch.arange(5)) and torch.equal(y, x + 1)


def test_epochs_differ_and_repeat_by_seed():
    ids = torch.arange(50)

    def starts(windows):
        return [x[:, 0].tolist() for x, _ in windows]

    windows = data.EpochWindows(ids, 5, 8, torch.Generator().manual_seed(3))
    first, second = starts(windows), starts(windows)
    assert first != second
    assert starts(data.epoch_windows(ids, 5, 8, torch.Generator().manual_seed(3))) == first


def test_windows_without_generator_keep_the_order_and_can_be_disjoint():
    windows = data.EpochWindows(torch.arange(18), 5, 2, stride=5)
    assert len(windows) == 2
    x, y = next(iter(windows))
    assert x.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and torch.equal(y, x + 1)
    targets = list(itertools.chain.from_iterable(y.flatten().tolist() for _, y in windows))
    assert targets == list(range(1, 16))


MAKERS = [data.random_windows, data.EpochWindows, data.epoch_windows]


@pytest.mark.parametrize("make", MAKERS)
def test_text_shorter_than_a_window_is_one_sentence_with_both_sizes(make):
    with pytest.raises(DataError, match=r"it has 64 tokens and a window needs 65 \(block_size 64"):
        make(torch.arange(64), 64, 2)
    with pytest.raises(DataError, match="it has 0 tokens"):
        make(torch.empty(0, dtype=torch.int64), 1, 2)


def test_the_shortest_text_has_one_window():
    x, y = data.random_windows(torch.arange(65), 64, 2)
    assert torch.equal(x, torch.arange(64).expand(2, 64)) and torch.equal(y, x + 1)
    assert len(data.EpochWindows(torch.arange(65), 64, 2)) == 1


@pytest.mark.parametrize("make", MAKERS)
def test_wrong_arguments_of_windows_are_named(make):
    with pytest.raises(DataError, match="1-D tensor of int64 or smaller integers, got 2-D int64"):
        make(torch.zeros(2, 9, dtype=torch.int64), 4, 2)
    with pytest.raises(DataError, match="1-D tensor of int64 or smaller integers, got 1-D float32"):
        make(torch.zeros(9), 4, 2)
    with pytest.raises(DataError, match="1-D tensor of int64 or smaller integers, got ndarray"):
        make(np.arange(9), 4, 2)
    with pytest.raises(DataError, match="block_size must be a whole number, at least 1, got 0"):
        make(torch.arange(9), 0, 2)
    with pytest.raises(DataError, match="block_size must be a whole number, at least 1, got 4.0"):
        make(torch.arange(9), 4.0, 2)
    with pytest.raises(DataError, match="batch_size must be a whole number, at least 1, got -1"):
        make(torch.arange(9), 4, -1)


def test_counts_of_windows_may_be_numpys():
    ids = torch.arange(300)
    for number in (np.int8, np.int64, torch.tensor):
        windows = data.EpochWindows(ids, number(4), number(3), stride=number(2))
        assert len(windows) == len(data.EpochWindows(ids, 4, 3, stride=2)) == 50
        assert torch.equal(next(iter(windows))[0], ids[: 3 * 2 + 2].unfold(0, 4, 2))
        x, _ = data.random_windows(ids, number(4), number(3))
        assert x.shape == (3, 4)
    assert data.abc_entropy(np.int8(2)) == data.abc_entropy(2)
    assert data.abc_corpus(np.int32(3)) == data.abc_corpus(3)
    with pytest.raises(DataError, match="seed must be a 32-bit integer, got 1.5"):
        data.abc_corpus(1.5)


def test_stride_below_one_is_refused():
    with pytest.raises(DataError, match="stride must be a whole number, at least 1, got 0"):
        data.EpochWindows(torch.arange(9), 4, 2, stride=0)
