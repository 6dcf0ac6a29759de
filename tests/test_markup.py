"""What notebooks show: HTML that is whole and escaped, and short reprs."""

import base64
import math
import pickle
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from small_models import model_of

import gptfast
from gptfast import GPT, BPETokenizer, CharTokenizer, Generation, GPTConfig, markup
from gptfast.generation.supported import unsupported_part
from gptfast.training import TrainResult, train

TEXT = "if a < b && c > d:\n\tprint('<script>')\n"
VOID = {"img"}  # elements without an end


class Page(HTMLParser):
    """Reads HTML; `text` is what it shows, and `spans` the marked pieces with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.tags = "", [], []
        self.spans: list[tuple[str, dict[str, str]]] = []
        self.images: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self.spans.append(("", dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "span":
            before, attributes = self.spans[-1]
            self.spans[-1] = before + data, attributes


def model_for(tokenizer: CharTokenizer | BPETokenizer, **options: Any) -> GPT:
    shape = {"block_size": 16, "n_embd": 32, "n_layer": 2, "padding_idx": tokenizer.padding}
    return model_of(GPTConfig(vocab_size=tokenizer.vocab_size, **shape, **options)).eval()


def test_text_is_escaped() -> None:
    page = Page(markup.section("<b>&", markup.table([["<script>alert('&')</script>", 'a"b']])))
    assert "script" not in page.tags and "<script>alert('&')</script>" in page.text
    assert page.text.startswith("<b>&") and 'a"b' in page.text
    span = Page(markup.marked("<i>\n", "\"'<&>", 0.5)).spans
    assert span == [("<i>\n", {"title": "\"'<&>", "style": "background: rgba(230, 159, 0, 0.25)"})]
    assert markup.escaped("\ud800&") == "\N{REPLACEMENT CHARACTER}&amp;"
    for strength, alpha in ((-1e-9, "0.00"), (2.0, "0.50")):
        assert f" {alpha})" in markup.marked("a", "", strength)


def test_numbers_are_to_the_right() -> None:
    found = markup.table([("a", "1", ""), ("2", "1,000.5", "7")], ("x", "y", "z"))
    assert re.findall(r"text-align: (\w+)", found) == ["left", "right", "right"] * 3


# ---- models


@pytest.mark.parametrize("options", ({}, {"tie_weights": True, "bias": False}))
def test_a_model(options: dict[str, Any]) -> None:
    model = model_for(CharTokenizer.from_text(TEXT), **options)
    page = Page(model._repr_html_())
    total = sum(each.numel() for each in model.parameters())
    assert page.text.startswith(f"GPT of {total:,} parameters")
    for fact in ("block_size 16", "n_layer 2", "float32", "cpu", "evaluation", "h.*.attn.c_attn"):
        assert fact in page.text
    assert f"total{total:,}" in page.text.replace(" ", "")
    assert ("tie_weights True" in page.text) == bool(options)
    numbers = [part.parameters for part in gptfast.summary.parts_of(model)]
    assert sum(numbers) == total
    assert str(model) == repr(model) and repr(model).startswith("GPT(\n")
    model.backend = "reference"
    assert "reference: plain torch" in model.train()._repr_html_()
    assert "training, with dropout" in model.to(torch.bfloat16)._repr_html_()
    assert "bfloat16" in model._repr_html_()


def test_replaced_layers_are_shown_and_a_picture_of_ones_own_keeps_the_engine() -> None:
    model = model_for(CharTokenizer.from_text(TEXT))
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    model.ln_f = torch.nn.Identity()
    assert "lm_head.parametrizations.weight" in Page(model._repr_html_()).text

    class Shown(GPT):
        def _repr_html_(self) -> str:
            return "mine"

    assert unsupported_part(Shown(GPTConfig(block_size=8, vocab_size=9, n_embd=16))) is None


# ---- runs


@pytest.fixture(scope="module")
def result() -> TrainResult:
    options = {"n_layer": 1, "n_embd": 16, "block_size": 8, "batch_size": 4, "progress": False}
    return train("abc", text=TEXT * 20, steps=6, eval_every=2, val_fraction=0.2, **options)


def test_a_run(result: TrainResult) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    page = Page(result._repr_html_())
    assert page.text.startswith("Finished run") and "table" in page.tags
    assert result.best is not None
    last, best = result.history[-1], result.best
    for shown in (
        f"{last['train_loss']:.4f} nats",
        f"{last['val_loss']:.4f} nats",
        f"{best['val_loss']:.4f} at step {best['step']}",
        f"{last['tokens_per_s']:,.0f} tokens/s",
        "CharTokenizer(vocab_size=",
    ):
        assert shown in page.text
    [image] = page.images
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64" and image["alt"]
    assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")


def test_a_run_without_matplotlib(result: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.training.result.can_draw", lambda: False)
    page = Page(result._repr_html_())
    assert page.images == [] and "held-out loss" in page.text
    assert all(f"{row['train_loss']:.4f}" in page.text for row in result.history)
    many = [{**result.history[0], "step": 7 * i, "val_loss": None} for i in range(1, 100)]
    page = Page(replace(result, history=many, best=None)._repr_html_())
    assert "693" in page.text and "at step" not in page.text  # the last one is there
    assert page.tags.count("tr") < 25


def test_runs_that_ended_early(result: TrainResult) -> None:
    early = replace(result, history=[], best=None, interrupted=True, signal=2)
    page = Page(early._repr_html_())
    assert page.text.startswith("Interrupted run (SIGINT)") and "none that was" in page.text
    assert repr(early) == "TrainResult(step=0, evaluations=0, interrupted=True, signal=2)"


def test_the_repr_of_a_run_is_one_line(result: TrainResult) -> None:
    last = result.history[-1]
    assert re.fullmatch(
        rf"TrainResult\(step=6, evaluations=3, train_loss={last['train_loss']:.4f}, "
        r"val_loss=\d\.\d{4}, best_step=\d, best_loss=\d\.\d{4}, interrupted=False, signal=None\)",
        repr(result),
    )


# ---- generated texts


def test_a_text_by_characters() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 200, "seed": 3}
    (found,) = gptfast.generate(model_for(tokenizer), ["if "], **options)
    page = Page(found._repr_html_())
    assert found.text is not None and {"<", "&", "\n", "\t"} <= set(found.text)
    assert [text for text, _ in page.spans] == [
        piece.decode() for piece in map(tokenizer.pieces.__getitem__, found.tokens)
    ]
    assert "".join(text for text, _ in page.spans) == found.text
    assert "200 tokens" in page.text and "finish reason: length" in page.text
    for logprob, token, (text, attributes) in zip(
        found.logprobs, found.tokens, page.spans, strict=True
    ):
        probability = math.exp(logprob)
        assert attributes["title"].startswith(f"{text!r}: probability {probability:.4f} (")
        assert attributes["title"].endswith(f"id {token}")
        strength = min(1.0, -math.log2(probability) / 8)  # 8 bits and more look alike
        assert f", {0.5 * strength:.2f})" in attributes["style"]


def test_a_text_by_byte_pairs_has_its_characters_whole() -> None:
    tokenizer = BPETokenizer.train("東京 é 👩 " * 3, 258)  # most characters are several tokens
    model = model_for(tokenizer)
    tokens = tokenizer.encode("é東京 👩")
    pieces = [tokenizer.pieces[token] for token in tokens]
    found = Generation("é東京 👩", tokens, [-1.0] * len(tokens), "end")
    found.pieces = pieces
    assert "".join(text for text, _ in Page(found._repr_html_()).spans) == found.text
    found.tokens, found.logprobs, found.pieces = tokens[:-1], found.logprobs[:-1], pieces[:-1]
    text = "".join(text for text, _ in Page(found._repr_html_()).spans)
    assert text.endswith("\N{REPLACEMENT CHARACTER}")  # as generate gives it
    (random,) = gptfast.generate(model, ["é"], tokenizer=tokenizer, max_new_tokens=50)
    assert "".join(text for text, _ in Page(random._repr_html_()).spans) == random.text


def test_texts_without_pieces() -> None:
    ids = Generation(None, [3, 1], [-0.5, -0.1], "length")
    assert [text for text, _ in Page(ids._repr_html_()).spans] == ["3 ", "1 "]
    page = Page(Generation("a <b>\n", [3, 1], [-0.5, -0.1], "length")._repr_html_())
    assert page.spans == [] and "a <b>\n" in page.text and "b" in page.tags  # of the title
    empty = Generation("", [], [], "stop")
    assert "0 tokens" in Page(empty._repr_html_()).text


def test_pieces_are_no_part_of_the_value() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    (found,) = gptfast.generate(model_for(tokenizer), ["if "], tokenizer=tokenizer)
    bare = Generation(found.text, found.tokens, found.logprobs, found.finish_reason)
    assert found == bare and repr(found) == repr(bare) and "pieces" not in asdict(found)
    again = pickle.loads(pickle.dumps(found))
    assert again == found and again.pieces == found.pieces


def test_the_reprs_of_texts_are_short() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    model = model_for(tokenizer)
    (found,) = gptfast.generate(model, ["if "], tokenizer=tokenizer, max_new_tokens=500)
    assert len(repr(found)) < 400 and "\n" not in repr(found)
    assert f" of 500, logprob={sum(found.logprobs):.4f})" in repr(found)
    short = Generation("ab", [1, 2], [-0.5, -0.25], "stop")
    assert repr(short) == (
        "Generation(text='ab', finish_reason='stop', tokens=[1, 2] of 2, logprob=-0.7500)"
    )
    (scored,) = gptfast.score(model, [TEXT * 10], tokenizer=tokenizer)
    assert len(repr(scored)) < 200
    assert f"logprob={scored.logprob:.4f}, bits_per_token={scored.bits_per_token:.4f}" in repr(
        scored
    )
    assert "bits" not in repr(gptfast.score(model, [[1]])[0])
