"""The files of byte-pair encodings: `tokenizer.json`, GPT-2's vocabulary and merges.

Nothing here needs the library `tokenizers`, whose format `tokenizer.json` is.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from gptfast.checks import check_path
from gptfast.errors import DataError, reason

GPT2 = "gpt2"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's
ENDINGS = (END_OF_TEXT, "<|end_of_text|>", "</s>")  # that tokenizers of others have
JSON_NAME = "tokenizer.json"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # Hugging Face's, OpenAI's
MOST_IDS = 1 << 24

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _byte_symbols() -> dict[int, str]:
    """Maps the code of GPT-2's symbol for each byte to the character with the byte's code."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # stand for themselves
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {256 + i: chr(b) for i, b in enumerate(hidden)}


BYTE_SYMBOLS = _byte_symbols()


class Parsed(NamedTuple):
    """What is in a `tokenizer.json`."""

    canonical: str  # its JSON without what changes or cuts texts: dropout, truncation, padding
    vocabulary: dict[str, int]  # ids by token, which is in GPT-2's symbols; without added ones
    merges: list[tuple[str, str]]  # of two tokens each, the first to be applied first
    ignores_merges: bool  # whether a word that is a token is taken as it is
    pieces: list[bytes]  # of each id
    added: dict[str, int]  # ids of the tokens that are added to the vocabulary
    special: dict[str, int]  # tokens that no text encodes to, which stand for no text
    by_words: bool  # whether a text may be cut before a space or line break, and encoded in parts


def parse(text: str) -> Parsed:
    """Reads the JSON of a tokenizer.

    Raises:
        DataError: It is no byte-pair encoding of all bytes.
    """
    try:
        found = json.loads(text)
        model, added = found["model"], found.get("added_tokens") or []
        vocabulary = {str(token): _id(i) for token, i in model["vocab"].items()}
        tokens = [
            (_text(each["content"]), _id(each["id"]), each["special"] is True) for each in added
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        kind = type(error).__name__
        raise DataError(
            f"not the tokenizer.json of a byte-pair encoding ({kind}: {error})"
        ) from None
    _check_bytes(found, vocabulary)
    merges = _merges(model)
    special_ids = {token: i for token, i, special in tokens if special}
    pieces = [b""] * (1 + max([*vocabulary.values(), *(i for _, i, _ in tokens)]))
    for token, i in vocabulary.items():
        pieces[i] = _bytes_of(token)
    for token, i, special in tokens:
        pieces[i] = b"" if special else token.encode("utf-8", "replace")
    found |= {"truncation": None, "padding": None, "post_processor": None}
    model["dropout"] = None
    canonical = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    plain = len(special_ids) == len(tokens) and found.get("normalizer") is None
    pre = found["pre_tokenizer"]
    by_words = plain and pre["type"] == "ByteLevel" and pre.get("use_regex", True) is True
    by_words = by_words and pre.get("add_prefix_space", True) is False  # it would add one per part
    ignores_merges = bool(model.get("ignore_merges"))
    ids = {token: i for token, i, _ in tokens}
    return Parsed(canonical, vocabulary, merges, ignores_merges, pieces, ids, special_ids, by_words)


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a model: lists of two parts or, in older files, strings."""
    try:
        pairs = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        return [(str(left), str(right)) for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise DataError(f"expected merges of two tokens each ({kind}: {error})") from None


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST_IDS:
        raise ValueError(f"a token has id {value!r}, expected one from 0 to {MOST_IDS - 1}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"an added token is a {type(value).__name__}, expected a text")
    return value


def _check_bytes(found: dict[str, Any], vocabulary: dict[str, int]) -> None:
    """Raises DataError unless each token is a string of bytes, and each byte has a token."""
    model = found["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise DataError(f"expected a tokenizer of byte-pair encoding, got one of the kind {kind!r}")
    marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if "ByteLevel" not in _types(found.get("pre_tokenizer")) or marks:
        raise DataError("expected a byte-level tokenizer, as GPT-2's, got one of characters")
    missing = [ord(byte) for symbol, byte in BYTE_SYMBOLS.items() if chr(symbol) not in vocabulary]
    if missing:
        raise DataError(f"expected a token for each of the 256 bytes, got none for {missing[0]}")


def _types(part: Any) -> set[str]:
    """The types of a pre-tokenizer and of those that it consists of."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("pretokenizers")
    parts = inner if isinstance(inner, list) else []
    return {str(part.get("type"))}.union(*map(_types, parts))


def _bytes_of(token: str) -> bytes:
    if all(ord(character) in BYTE_SYMBOLS for character in token):
        return token.translate(BYTE_SYMBOLS).encode("latin-1")
    return token.encode("utf-8", "replace")  # it is written as it is


def read_json(source: str | Path) -> str:
    """Finds a tokenizer's files, and returns them as the JSON of a `tokenizer.json`.

    Args:
        source: A `tokenizer.json`; a folder with one, or with GPT-2's vocab.json and merges.txt; or
            "gpt2", which stands for such a folder in Hugging Face's cache. Nothing is downloaded.

    Raises:
        DataError: There are no such files, or they cannot be read.
    """
    path = check_path("the tokenizer", source)
    if f"{source}" == GPT2 and not path.exists():
        path = _cached_gpt2()
    if path.is_dir():
        folder, path = path, path / JSON_NAME
        if not path.is_file():
            return _from_pair(folder)
    return _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from error


def _from_pair(folder: Path) -> str:
    for names in PAIRS:
        vocabulary, merges = (folder / name for name in names)
        if vocabulary.is_file() and merges.is_file():
            break
    else:
        files = " or ".join((JSON_NAME, *(" with ".join(pair) for pair in PAIRS)))
        raise DataError(f"{folder}: no tokenizer, it has no {files}")
    try:
        ids = json.loads(_read(vocabulary))
        end = ids.get(END_OF_TEXT)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{vocabulary}: not the JSON of a vocabulary ({error})") from error
    lines = _read(merges).splitlines()
    first = 1 if lines and lines[0].startswith("#version") else 0
    pairs = [line.split(" ") for line in lines[first:] if line]
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [] if end is None else [{"id": end, "content": END_OF_TEXT, **special, "special": True}]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": ids, "merges": pairs},
    }
    return json.dumps(content, ensure_ascii=False)


def _cached_gpt2() -> Path:
    """The folder in Hugging Face's cache that has GPT-2's tokenizer."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
    )
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    for name in ("models--openai-community--gpt2", "models--gpt2"):
        for folder in sorted((hub / name / "snapshots").glob("*")):
            for names in ((JSON_NAME,), *PAIRS):
                if all((folder / each).is_file() for each in names):
                    return folder
    raise DataError(
        f"gpt2: its tokenizer is not in {hub}, and nothing is downloaded: name a tokenizer.json, "
        "or a folder with vocab.json and merges.txt, of https://huggingface.co/openai-community/gpt2"
    )
