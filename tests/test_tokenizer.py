import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptfast.cli.inspection import tokenizer_line
from gptfast.data import abc_corpus
from gptfast.data.prepare import prepare
from gptfast.errors import ConfigError, DataError
from gptfast.tokenizer import PAD_ID, CharTokenizer
from gptfast.training import train

ANY_TEXT = st.text(st.characters(exclude_categories=()), min_size=1)


def test_ids_are_padding_then_the_sorted_characters():
    tokenizer = CharTokenizer.from_text(abc_corpus())
    assert tokenizer.chars == ("\n", "A", "B", "C")
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("CAB\n") == [4, 2, 3, 1]


def test_shakespeare_has_65_characters_and_comes_back_whole(shakespeare_text):
    tokenizer = CharTokenizer.from_text(shakespeare_text)
    assert tokenizer.vocab_size == 66
    ids = tokenizer.encode_tensor(shakespeare_text)
    assert ids.shape == (1_115_394,) and ids.dtype == torch.int64
    assert (ids.min(), ids.max()) == (1, 65)
    assert tokenizer.decode(ids) == shakespeare_text


@given(ANY_TEXT)
def test_encode_and_decode_are_inverse(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert all(type(i) is int and i != PAD_ID for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_tensor(text).tolist() == ids


@given(ANY_TEXT, ANY_TEXT)
def test_skip_leaves_out_what_is_unknown_and_error_names_the_first(known, text):
    tokenizer = CharTokenizer.from_text(known)
    kept = [char for char in text if char in known]
    assert tokenizer.decode(tokenizer.encode(text, unknown="skip")) == "".join(kept)
    if len(kept) < len(text):
        place = next(i for i, char in enumerate(text) if char not in known)
        with pytest.raises(DataError) as caught:
            tokenizer.encode(text)
        assert f"{text[place]!r} at position {place} " in str(caught.value)


@pytest.mark.parametrize("encode", [CharTokenizer.encode, CharTokenizer.encode_tensor])
def test_unknown_character_is_named_with_its_place(encode):
    tokenizer = CharTokenizer.from_text("ab\n")
    with pytest.raises(DataError, match=r"'é' at position 5 \(line 3, column 2\) .* 3 characters"):
        encode(tokenizer, "ab\n\naéz")
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        encode(tokenizer, "a", unknown="ignore")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        encode(tokenizer, b"a")


def test_empty_text_encodes_to_nothing_but_makes_no_vocabulary():
    tokenizer = CharTokenizer.from_text("a")
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.encode_tensor("").dtype == torch.int64
    with pytest.raises(DataError, match="empty text"):
        CharTokenizer.from_text("")


def test_decode_drops_padding_and_refuses_other_ids():
    tokenizer = CharTokenizer.from_text("ab")
    assert tokenizer.decode([0, 1, 0, 2, 0]) == "ab"
    assert tokenizer.decode(torch.tensor([0, 2, 1])) == "ba"
    for bad in (-1, 3):
        with pytest.raises(DataError, match=f"id {bad} is out of range: expected 0 to 2"):
            tokenizer.decode([1, bad])
    for ids in ([[1, 2]], [1.0], torch.tensor([[1, 2]]), torch.tensor([1.0])):
        with pytest.raises(TypeError, match="flat sequence of integers"):
            tokenizer.decode(ids)


@given(ANY_TEXT)
def test_json_form_comes_back_equal(text):
    tokenizer = CharTokenizer.from_text(text)
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


@given(ANY_TEXT)
def test_without_padding_the_first_character_has_id_0(text):
    chars = tuple(dict.fromkeys(text))
    tokenizer = CharTokenizer(chars, padded=False)
    assert (tokenizer.vocab_size, tokenizer.padding) == (len(chars), None)
    assert tokenizer.encode("".join(chars)) == [*range(len(chars))]
    assert tokenizer.decode(tokenizer.encode_tensor(text)) == text
    assert b"".join(tokenizer.pieces) == "".join(chars).encode("utf-8", "surrogatepass")
    again = CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again == tokenizer != CharTokenizer(chars)


def test_without_padding_other_characters_are_unknown_too():
    tokenizer = CharTokenizer(("b", "a"), padded=False)
    assert tokenizer.encode("zabé", unknown="skip") == [1, 0]
    with pytest.raises(DataError, match="'z' at position 1 .* 2 characters"):
        tokenizer.encode("az")
    with pytest.raises(DataError, match="id 2 is out of range: expected 0 to 1"):
        tokenizer.decode([2])


def test_inspection_tells_whether_there_is_padding():
    assert tokenizer_line(CharTokenizer(("a", "b"))) == "3 ids: <PAD> and 'ab'"
    assert tokenizer_line(CharTokenizer(("a", "b"), padded=False)) == "2 ids: 'ab'"


def test_halves_of_surrogate_pairs_stay_two_characters():
    tokenizer = CharTokenizer.from_text("ab\ud83d\ude00")  # in a string, JSON would join the two
    assert tokenizer.vocab_size == 5
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_the_joined_form_of_older_checkpoints_is_read():
    tokenizer = CharTokenizer.from_dict({"kind": "char", "chars": "\nABC"})
    assert tokenizer == CharTokenizer(("\n", "A", "B", "C"))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "expected a tokenizer"),
        ([], "expected a tokenizer"),
        ({"kind": "bpe", "chars": "ab"}, "expected a tokenizer"),
        ({"kind": "char", "chars": ["a"]}, "expected a tokenizer"),
        ({"kind": "char", "code_points": "ab"}, "expected a tokenizer"),
        ({"kind": "char", "code_points": [97, "b"]}, "expected a tokenizer"),
        ({"kind": "char", "code_points": [97, True]}, "expected a tokenizer"),
        ({"kind": "char", "code_points": [97, 98.0]}, "expected a tokenizer"),
        ({"kind": "char", "code_points": [-1]}, "expected a tokenizer"),
        ({"kind": "char", "code_points": [0x110000]}, "expected a tokenizer"),
        ({"kind": "char", "code_points": []}, "at least one character"),
        ({"kind": "char", "code_points": [97], "padded": 0}, "padded must be True or False, got 0"),
        ({"kind": "char", "code_points": [97, 98, 97]}, "'a' twice"),
        ({"kind": "char", "chars": ""}, "at least one character"),
        ({"kind": "char", "chars": "aba"}, "'a' twice"),
    ],
)
def test_other_forms_are_refused(form, message):
    with pytest.raises(DataError, match=message):
        CharTokenizer.from_dict(form)


def test_vocabulary_holds_single_characters_only():
    with pytest.raises(DataError, match="'ab'"):
        CharTokenizer(("ab",))


def test_a_tokenizer_that_would_not_come_back_is_not_stored(tmp_path):
    class Lower(CharTokenizer):
        def encode_tensor(self, text, unknown="error"):
            return super().encode_tensor(text.lower(), unknown)

    own, text = Lower.from_text("abc\n"), "ABC\n" * 100
    (tmp_path / "text").write_text(text)
    refused = "a tokenizer of type Lower cannot be stored"
    with pytest.raises(ConfigError, match=refused):
        train("abc", tmp_path / "run", text=text, tokenizer=own, progress=False)
    with pytest.raises(ConfigError, match=refused):
        prepare([tmp_path / "text"], tmp_path / "tokens", own)
    assert {path.name for path in tmp_path.iterdir()} == {"text"}
    train("abc", text=text, tokenizer=own, progress=False, steps=1, n_embd=8, eval_tokens=None)
