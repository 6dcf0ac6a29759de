"""Evaluation: windows of every stride, bits per byte, and `gptfast eval`."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, shown
from generating import make
from small_models import small_model

import gptfast
from gptfast import GPT, BPETokenizer, CharTokenizer, ConfigError
from gptfast.data.prepare import prepare
from gptfast.data.token_files import open_tokens
from gptfast.generation.scoring import windows_of
from gptfast.tokenizer import TextSize
from gptfast.training import evaluate
from gptfast.training.evaluation import Evaluation

TEXT = "Die Würde des Menschen\nist unantastbar: 東京, naïve café. " * 6
# Losses are means in float32 of terms of about 3 nats, whose logits two ways of computing round
# differently, by at most some units in the last place of sums of 32 products: about 1e-6 each.
CLOSE = 1e-5


@pytest.fixture
def model() -> GPT:
    """A model of 37 tokens of 30 kinds, whose logits differ much."""
    return make("odd").eval()


def model_for(tokenizer: CharTokenizer) -> GPT:
    return small_model(seed=1, block_size=16, vocab_size=tokenizer.vocab_size, n_embd=32)


def tokens_for(model: GPT, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, model.config.vocab_size, (count,), generator=generator)


def token_losses(model: GPT, ids: torch.Tensor, context: int) -> list[float]:
    """The loss of each token after the first, given all of the last `context` before it."""
    losses = []
    for t in range(1, len(ids)):
        logits = model(ids[None, max(0, t - context) : t])[0, -1].detach().double()
        losses.append(-logits.log_softmax(-1)[ids[t]].item())
    return losses


@pytest.mark.parametrize("stride", (None, 1, 3, 8))
@pytest.mark.parametrize("tokens", (0, 1, 2, 8, 9, 10, 17, 30))
def test_windows_predict_every_token_once(tokens: int, stride: int | None) -> None:
    T, predicted = 8, []
    for first, last, new in windows_of(tokens, T, stride):
        assert 0 <= first < last < tokens and last - first <= T
        predicted += range(last - new + 1, last + 1)
        if stride is None:
            assert new == last - first and first % T == 0
        else:
            assert last - first == min(T, tokens - 1)  # full, also at the end
            assert first == 0 or last - new + 1 - first >= T - stride + 1  # tokens before a new one
    assert predicted == [*range(1, tokens)]


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_a_stride_of_one_gives_every_token_all_the_context(model: GPT, backend: Any) -> None:
    ids = tokens_for(model, 3 * model.config.block_size)
    model.backend = "reference"
    expected = token_losses(model, ids, model.config.block_size)
    model.backend = backend
    result = evaluate(model, ids, stride=1)
    assert result.tokens == len(ids) - 1
    assert result.loss == pytest.approx(sum(expected) / len(expected), abs=CLOSE)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert abs(evaluate(model, ids).loss - result.loss) > 100 * CLOSE  # context matters here


def test_a_stride_of_the_window_gives_disjoint_windows(model: GPT) -> None:
    T = model.config.block_size
    whole = tokens_for(model, 4 * T + 1)
    assert evaluate(model, whole, stride=T) == evaluate(model, whole)  # bitwise
    # Of another length, the last window is moved back until it is full.
    ids, left = whole[: 3 * T + 6], 5
    losses = [evaluate(model, ids[start : start + T + 1]).loss for start in (0, T, 2 * T)]
    last = token_losses(model, ids[-T - 1 :], T)[-left:]
    total = T * sum(losses) + sum(last)
    result = evaluate(model, ids, stride=T)
    assert result.loss == pytest.approx(total / (len(ids) - 1), abs=CLOSE)
    assert abs(evaluate(model, ids).loss - result.loss) > 100 * CLOSE


@pytest.mark.parametrize("stride", (1, 5, 36, 37))
@pytest.mark.parametrize("tokens", (2, 37, 38, 39, 100, 111))
def test_evaluate_and_score_are_of_one_mind(model: GPT, tokens: int, stride: int) -> None:
    ids = tokens_for(model, tokens)
    (scored,) = gptfast.score(model, [ids.tolist()], stride=stride)
    result = evaluate(model, ids, stride=stride)
    assert result.loss == pytest.approx(-scored.logprob / (tokens - 1), abs=CLOSE)
    assert scored.bits_per_token is not None
    assert result.bits_per_token == pytest.approx(scored.bits_per_token)
    assert result.bits_per_byte is None and result.size is None


def test_batches_tokens_of_small_dtypes_and_modes_change_nothing(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, told = tokens_for(model, 200), []
    expected = evaluate(model, ids, stride=7)
    model.train()
    monkeypatch.setattr("gptfast.training.evaluation.EVAL_TOKENS_AT_ONCE", 80)  # two windows
    result = evaluate(model, ids.to(torch.uint16), stride=7, scored=told.append)
    assert model.training and sum(told) == result.tokens and len(told) > 5
    assert result.loss == pytest.approx(expected.loss, abs=CLOSE)


def test_bits_per_byte_by_hand() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    model = model_for(tokenizer).eval()
    result = evaluate(model, tokenizer.encode_tensor(TEXT), tokenizer=tokenizer)
    bits = 0.0
    for start in range(0, len(TEXT) - 1, 16):  # disjoint windows, each character from those before
        ids = tokenizer.encode_tensor(TEXT[start : start + 17])
        bits += sum(token_losses(model, ids, 16)) / math.log(2)
    characters, size = len(TEXT) - 1, len(TEXT[1:].encode("utf-8"))
    assert size > characters  # or the test would tell less
    assert result.size == TextSize(characters, size, 0)
    # The sum has some hundred terms, each rounded as CLOSE says.
    assert result.bits_per_byte == pytest.approx(bits / size, abs=CLOSE)
    assert result.bits_per_character == pytest.approx(bits / characters, abs=CLOSE)
    assert result.bits_per_token == pytest.approx(result.bits_per_character)


def test_the_bits_of_an_end_of_text_count_though_it_writes_no_byte(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(TEXT, 280)
    parts = [tmp_path / name for name in ("one.txt", "two.txt")]
    for part, text in zip(parts, ("Die Würde", "ist naïv"), strict=True):
        part.write_text(text, encoding="utf-8")
    file = open_tokens(prepare(parts, tmp_path / "tokens", tokenizer).path)
    model = small_model(seed=2, vocab_size=280, n_embd=32, padding_idx=None).eval()
    result = evaluate(model, file.ids, stride=1, tokenizer=tokenizer)
    first = tokenizer.decode(file.ids[:1].long())
    written = "Die Würdeist naïv"[len(first) :]
    assert result.size == TextSize(len(written), len(written.encode("utf-8")), 2)
    bits = sum(token_losses(model, file.ids.long(), 8)) / math.log(2)  # of both ends, too
    assert result.bits_per_byte == pytest.approx(bits / len(written.encode("utf-8")), abs=CLOSE)


def test_nothing_written_has_no_bits_per_byte() -> None:
    result = Evaluation(2.0, math.exp(2.0), 3, TextSize(0, 0, 3))
    assert result.bits_per_byte is None and result.bits_per_character is None
    assert result.bits_per_token == pytest.approx(2 / math.log(2))


@pytest.mark.parametrize("stride", (0, 38, 1.5, "8"))
def test_a_stride_is_from_one_to_the_window(model: GPT, stride: Any) -> None:
    with pytest.raises(ConfigError, match=r"stride must be a whole number from 1 to 37, got "):
        evaluate(model, tokens_for(model, 9), stride=stride)


# ---- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model without training, as a checkpoint, with a text beside it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = CharTokenizer.from_text(TEXT)
    gptfast.save(model_for(tokenizer), tokenizer, folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def test_the_command_prints_what_evaluate_gives(run: Path, capsys: Any) -> None:
    model, tokenizer = gptfast.load(run)
    assert tokenizer is not None
    ids = tokenizer.encode_tensor(TEXT)
    for stride in (None, 4):
        result = evaluate(model, ids, stride=stride, tokenizer=tokenizer)
        option = [] if stride is None else ["--stride", stride]
        out = shown(capsys, "eval", run, "--data", run / "text.txt", *option)
        assert f"loss        {result.loss:.4f} nats per character\n" in out
        assert f"perplexity  {result.perplexity:.4f}\n" in out
        assert f"bits        {result.bits_per_character:.4f} per character\n" in out
        assert f"bits        {result.bits_per_byte:.4f} per byte\n" in out
        for name, count in (("tokens", len(TEXT) - 1), ("bytes", len(TEXT[1:].encode()))):
            assert re.search(rf"^{name} +{count:,}$", out, re.M)
        line = "16 tokens, " + ("disjoint" if stride is None else "stride 4: past the first, each")
        assert f"window      {line}" in out
    assert "sees 13 or more\n" in out


def test_the_command_refuses_a_stride_beyond_the_window(run: Path, capsys: Any) -> None:
    error = refused(capsys, "eval", run, "--data", run / "text.txt", "--stride", 17)
    assert error == "stride must be a whole number from 1 to 16, got 17"


def test_the_command_counts_the_ends_of_documents(tmp_path: Path, capsys: Any) -> None:
    tokenizer = BPETokenizer.train(TEXT, 280)
    (tmp_path / "text.txt").write_text("Die Würde\n--\ndes Menschen\n", encoding="utf-8")
    prepare([tmp_path / "text.txt"], tmp_path / "tokens", tokenizer, separator="--")
    gptfast.save(small_model(vocab_size=280, padding_idx=None), tokenizer, tmp_path / "run")
    out = shown(capsys, "eval", tmp_path / "run", "--data", tmp_path / "tokens", "--stride=2")
    assert "endings     2 tokens that end a text, and write no byte\n" in out
    for unit in ("token", "character", "byte"):
        assert re.search(rf"^bits +\d+\.\d{{4}} per {unit}$", out, re.M)


def test_the_model_of_lm_eval_says_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith(("lm_eval.", "gptfast.lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"missing: pip install 'gptfast-kernels\[eval\]'"):
        import gptfast.lm_eval  # noqa: F401


def test_ids_that_only_the_model_has_write_nothing(model: GPT) -> None:
    tokenizer = CharTokenizer(tuple("abcdefgh"))
    ids = torch.tensor([1, 2, 20, 3, 25])
    size = evaluate(model, ids, tokenizer=tokenizer).size
    assert size is not None and (size.characters, size.utf8_bytes) == (2, 2)
    many = CharTokenizer(tuple(map(chr, range(200, 300))))
    with pytest.raises(ConfigError, match="the tokenizer has 101 ids, the model"):
        evaluate(model, ids, tokenizer=many)
