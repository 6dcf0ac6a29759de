"""Makes token files: streams texts through a tokenizer, in several processes, to the disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from gptfast.checks import check_count
from gptfast.data.documents import Part, jobs, parts
from gptfast.data.token_files import (
    FORMAT,
    META_NAME,
    TOKENS_NAME,
    VERSION,
    TokenFile,
    open_tokens,
)
from gptfast.data.tokens import check_cuts, dtype_for
from gptfast.data.workers import mapped
from gptfast.encoding import UnknownCharacterError
from gptfast.errors import DataError, reason
from gptfast.files import write_atomic
from gptfast.lock import LOCK_NAME, locked
from gptfast.tokenizer import Tokenizer, check_kept

MOST_PROCESSES = 1024

Read = Callable[[int], None]  # called with the number of bytes read
Encoded = tuple[bytes, int, int]  # tokens as bytes, how many, and how many documents end there


def prepare(
    texts: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    separator: str | None = None,
    processes: int = 1,
    overwrite: bool = False,
    read: Read = lambda _: None,
) -> TokenFile:
    """Writes texts as tokens into a folder, from which `train(data=...)` reads them.

    Each document is followed by the tokenizer's end-of-text token, where it has one. The texts are
    never in memory as a whole. The folder is complete or as it was before; the result does not
    depend on the number of processes.

    Args:
        texts: UTF-8 files; each is a document.
        out: The folder, made if missing.
        tokenizer: What encodes the texts, see also `gptfast.data.tokens.char_tokenizer`.
        separator: The line that separates documents within a file.
        processes: How many encode. More than one needs, as all of Python's new processes, a main
            module that can be imported.
        overwrite: Replace the tokens that are in the folder.
        read: Called with the number of bytes of each piece that has been read.

    Raises:
        DataError: A text is missing, empty, not UTF-8 or has characters that the tokenizer lacks;
            the folder holds tokens already, or cannot be written.
    """
    out = Path(out)
    paths = [Path(text) for text in texts]
    check_folder(out, overwrite)
    check_kept(tokenizer)
    if not paths:
        raise DataError("there is no text to prepare")
    check_count("processes", processes, 1, MOST_PROCESSES)
    try:
        with _folder(out):
            check_folder(out, overwrite)  # again: another one may have ended meanwhile
            found = chain.from_iterable(parts(path, separator, read) for path in paths)
            writer = _Writer(tokenizer, _checked(found, tokenizer), processes)
            files = {out / TOKENS_NAME: writer.tokens, out / META_NAME: writer.meta}
            write_atomic(files, durable=True)
    except BlockingIOError:
        raise DataError(f"{out}: other tokens are being prepared there") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({reason(error)})") from error
    return open_tokens(out)


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises DataError if tokens may not be written to a folder; changes nothing."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: expected a folder for the tokens, got a file")
    if any((out / name).exists() for name in (TOKENS_NAME, META_NAME)) and not overwrite:
        raise DataError(f"{out}: holds tokens already: choose another folder, or say overwrite")


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Makes and locks a folder; removes it again if it stays empty."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK_NAME):
            yield
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                out.rmdir()


def pieces(
    texts: Sequence[str | Path], separator: str | None = None, read: Read = lambda _: None
) -> Iterator[str]:
    """Yields the texts that `prepare` would encode, to make a tokenizer from; see `prepare`."""
    for path in texts:
        for part in parts(Path(path), separator, read):
            yield part.text


def _checked(parts: Iterator[Part], tokenizer: Tokenizer) -> Iterator[Part]:
    """Yields parts; checks the first cut within a document."""
    checked = within = False
    for part in parts:
        if within and not checked:
            check_cuts(tokenizer, part.text)
            checked = True
        within = not part.ends
        yield part


class _Writer:
    """Encodes parts of documents and writes the two files, the tokens first."""

    def __init__(self, tokenizer: Tokenizer, parts: Iterator[Part], processes: int) -> None:
        self._tokenizer, self._parts, self._processes = tokenizer, parts, processes
        self._sha = hashlib.sha256()
        self._tokens = self._documents = 0

    def tokens(self, file: BinaryIO) -> None:
        """Writes tokens.bin."""
        for content, tokens, documents in self._encoded():
            self._sha.update(content)
            file.write(content)
            self._tokens += tokens
            self._documents += documents
        if not self._tokens:
            raise DataError("the texts have no tokens")

    def meta(self, file: BinaryIO) -> None:
        """Writes meta.json."""
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype_for(self._tokenizer.vocab_size).name,
            "tokens": self._tokens,
            "documents": self._documents,
            "sha256": self._sha.hexdigest(),
            "tokenizer": self._tokenizer.to_dict(),
        }
        file.write(json.dumps(meta).encode("utf-8"))

    def _encoded(self) -> Iterator[Encoded]:
        """Yields the parts as tokens, in their order."""
        work = partial(_encode, self._tokenizer)
        if self._processes == 1:
            return map(work, jobs(self._parts))
        return mapped(work, jobs(self._parts), self._processes)


def _encode(tokenizer: Tokenizer, job: list[Part]) -> Encoded:
    dtype = dtype_for(tokenizer.vocab_size).newbyteorder("<")
    end = tokenizer.end_of_text
    mark = b"" if end is None else end.to_bytes(dtype.itemsize, "little")
    content = bytearray()
    for part in job:
        try:
            ids = tokenizer.encode_tensor(part.text)
        except UnknownCharacterError as error:
            raise DataError(f"{part.document}: {error.within(part.start)}") from None
        content += ids.numpy().astype(dtype).tobytes()
        if part.ends:
            content += mark
    return bytes(content), len(content) // dtype.itemsize, sum(part.ends for part in job)
