"""Tokenizers as Hugging Face keeps them: `tokenizer.json`, or GPT-2's two files, and settings.

A CharTokenizer is written as a tokenizer of whole words, each of which is a character.
"""

import json
from pathlib import Path
from typing import Any

from gptfast.bpe import BPETokenizer
from gptfast.bpe_files import ENDINGS, JSON_NAME, PAIRS, parse
from gptfast.bpe_files import read_json as read_tokenizer_json
from gptfast.errors import CheckpointError, DataError
from gptfast.formats.huggingface_config import CONFIG_NAME
from gptfast.formats.weight_files import read_json
from gptfast.integrity import reading
from gptfast.tokenizer import PAD, PAD_ID, CharTokenizer, Tokenizer

SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"  # beside GPT-2's two files
VOCABULARY_NAMES = (JSON_NAME, *(name for pair in PAIRS for name in pair))

_CHARACTER = {  # cuts a text into characters; a dot would leave out line breaks
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}
_UNKNOWN = "<unk>"  # is in no vocabulary, so that other characters are an error
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads a folder's tokenizer, without the library `tokenizers`; None if there is none.

    A text ends at the token that `tokenizer_config.json`, `special_tokens_map.json` or, by its id,
    `config.json` names; else at the first of `bpe_files.ENDINGS` that there is. No other setting of
    these files that adds tokens to a text is followed: special tokens come in as ids alone.

    Raises:
        CheckpointError: A file is damaged, the tokenizer is of another kind than gptfast's, or the
            token that ends a text is not in it.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_NAMES):
        return None
    settings = _settings(folder, SETTINGS_NAME)
    try:
        text = read_tokenizer_json(folder)
        with reading(folder / JSON_NAME):
            content = json.loads(text)
            if content["model"].get("type") == "WordLevel":
                return _from_words(content)
        if not (folder / JSON_NAME).is_file():
            own = {each["content"] for each in content["added_tokens"]}
            content["added_tokens"] += [
                {"id": i, "content": token, **_PLAIN, "special": True}
                for token, i in _settings(folder, ADDED_NAME).items()
                if token not in own
            ]
            text = json.dumps(content)
        special = parse(text).special
        _follow_prefix(content, settings)
        ending = _ending(folder, special, settings)
        if ending is not None and ending not in special:
            _make_special(content, ending)
        return BPETokenizer(json.dumps(content), ending)
    except DataError as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {error}") from error


def _settings(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    return read_json(file) if file.is_file() else {}


def _follow_prefix(content: dict[str, Any], settings: dict[str, Any]) -> None:
    """Notes whether a text begins with a space that it lacks, which GPT-2's class takes from here.

    Other classes take it from the `tokenizer.json`.
    """
    pre = content["pre_tokenizer"]
    if pre.get("type") == "ByteLevel":
        if settings.get("tokenizer_class", _GPT2_CLASSES[0]) in _GPT2_CLASSES:
            pre["add_prefix_space"] = settings.get("add_prefix_space") is True


def _ending(folder: Path, special: dict[str, int], settings: dict[str, Any]) -> str | None:
    """Finds the token that ends a text."""
    for found in (settings, _settings(folder, SPECIAL_NAME)):
        token = found.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    end = _settings(folder, CONFIG_NAME).get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    named = [token for token, i in special.items() if i in ends]
    return next((token for token in (*named, *ENDINGS) if token in special), None)


def _make_special(content: dict[str, Any], token: str) -> None:
    """Makes a token of the vocabulary a special one, as Hugging Face does with what is named so."""
    added = content["added_tokens"] = content.get("added_tokens") or []
    ids = content["model"]["vocab"] | {each["content"]: each["id"] for each in added}
    if token not in ids:
        raise DataError(f"{token!r}, which ends a text (eos_token), has no id")
    others = [each for each in added if each["content"] != token]
    special = {"id": ids[token], "content": token, **_PLAIN, "special": True}
    content["added_tokens"] = [*others, special]


def _from_words(content: dict[str, Any]) -> CharTokenizer:
    """Reads what `_to_words` wrote."""
    words = {i: word for word, i in content["model"]["vocab"].items()}
    known = (content["pre_tokenizer"], content.get("normalizer")) == (_CHARACTER, None)
    padded = words.get(PAD_ID) == PAD
    chars = [words.get(i, "") for i in range(padded, len(words))]
    if known and all(len(char) == 1 for char in chars):
        points: dict[str, Any] = {"kind": "char", "code_points": [*map(ord, chars)]}
        found = CharTokenizer.from_dict(points if padded else points | {"padded": False})
        if found.vocab_size == len(words):
            return found
    raise DataError(
        "expected byte-pair encoding, or characters as gptfast writes them, got other words"
    )


def _to_words(tokenizer: CharTokenizer) -> str:
    """Writes the `tokenizer.json` of characters; padding is a word that no text is cut to."""
    padding = [] if tokenizer.padding is None else [PAD]
    vocabulary = {word: i for i, word in enumerate([*padding, *tokenizer.chars])}
    try:
        "".join(tokenizer.chars).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"tokenizer.json holds no half of a surrogate pair, as the tokenizer's character "
            f"{error.object[error.start]!r}"
        ) from None
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": _CHARACTER,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN},
    }
    return json.dumps(content, ensure_ascii=False, indent=2)


def to_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """Returns the files of a tokenizer by their names.

    Args:
        tokenizer: A CharTokenizer or BPETokenizer.
        block_size: The longest text that the model takes, in tokens.

    Raises:
        CheckpointError: A character is half of a surrogate pair, which the files cannot hold.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        # The default of earlier versions has token_type_ids, whose embeddings GPT-2 would add.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer, BPETokenizer):
        content = tokenizer.json
        if tokenizer.ending is not None:
            settings |= {"bos_token": tokenizer.ending, "eos_token": tokenizer.ending}
    else:
        assert isinstance(tokenizer, CharTokenizer)
        content = _to_words(tokenizer)
        settings["split_special_tokens"] = True  # a text that reads "<PAD>" is five characters
        if tokenizer.padding is not None:
            settings["pad_token"] = PAD
    return {JSON_NAME: content, SETTINGS_NAME: json.dumps(settings, indent=2) + "\n"}
