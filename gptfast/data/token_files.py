"""Token files: a folder with a corpus as tokens, which training maps into memory.

`tokens.bin` has the ids of all tokens, one after the other, little-endian, in the smallest unsigned
dtype that holds the vocabulary. `meta.json` says how to read it: dtype, number of tokens and of
documents, the tokenizer, and the SHA-256 of `tokens.bin`, by which runs know their text again.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.data.texts import PIECE
from gptfast.data.tokens import dtype_for
from gptfast.errors import DataError, reason
from gptfast.tokenizer import Tokenizer, from_dict

TOKENS_NAME = "tokens.bin"
META_NAME = "meta.json"
FORMAT = "gptfast-tokens"
VERSION = 1


@dataclass(frozen=True)
class TokenFile:
    """A folder of tokens, mapped into memory."""

    path: Path
    ids: Tensor  # (N,) uint8, uint16 or uint32; a window is read from the disk when it is used
    tokenizer: Tokenizer
    documents: int
    sha256: str  # of tokens.bin, as meta.json has it: opening does not read the tokens

    def fingerprint(self, *parts: Tensor | None) -> str:
        """Names leading parts of the tokens, one after the other, without reading them."""
        return f"tokens {self.sha256} {[0 if part is None else len(part) for part in parts]}"


def open_tokens(path: str | Path) -> TokenFile:
    """Opens a folder that `prepare` wrote. Does not read the tokens.

    Raises:
        DataError: There is none, it is not complete, or its two files do not fit together.
    """
    path = Path(path)
    file, meta = path / TOKENS_NAME, _read_meta(path)
    try:
        dtype, tokens, documents = np.dtype(meta["dtype"]), meta["tokens"], meta["documents"]
        tokenizer, sha256 = from_dict(meta["tokenizer"]), meta["sha256"]
        if dtype != dtype_for(tokenizer.vocab_size) or not isinstance(sha256, str):
            raise ValueError(f"dtype {dtype} for {tokenizer.vocab_size} ids")
        size = tokens * dtype.itemsize
        if not isinstance(documents, int) or size <= 0:
            raise ValueError(f"{tokens} tokens of {documents} documents")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / META_NAME}: damaged ({type(error).__name__}: {error})") from None
    try:
        found = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({reason(error)})") from None
    if found != size:
        raise DataError(
            f"{file}: expected {size:,} bytes for {tokens:,} tokens, got {found:,}: prepare it anew"
        )
    return TokenFile(path, _mapped(file, dtype.newbyteorder("<")), tokenizer, documents, sha256)


def verify(tokens: TokenFile) -> None:
    """Reads all tokens. Raises DataError if they are no longer those that were written."""
    file = tokens.path / TOKENS_NAME
    sha = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while block := opened.read(PIECE):
                sha.update(block)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({reason(error)})") from None
    if sha.hexdigest() != tokens.sha256:
        raise DataError(
            f"{file}: damaged: expected sha256 {tokens.sha256[:12]}…, got {sha.hexdigest()[:12]}…"
        )


def _mapped(file: Path, dtype: np.dtype) -> Tensor:
    try:
        array = np.memmap(file, dtype, mode="r")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({reason(error)})") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that tensors can be written to: nothing writes
        return torch.from_numpy(array)


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / META_NAME
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no folder of tokens, it has no {META_NAME}, which `gptfast data prepare` "
            "writes last"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({reason(error)})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{file}: not the description of a token file of gptfast")
    if meta.get("version") != VERSION:
        raise DataError(f"{file}: version {meta.get('version')!r}, this gptfast reads {VERSION}")
    return meta
