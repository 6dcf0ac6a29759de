"""`gptfast data`: the corpora, and texts as folders of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptfast.cli.options import Command, Count, File, bar
from gptfast.errors import ConfigError, DataError
from gptfast.files import write_atomic

if TYPE_CHECKING:
    from gptfast.data.token_files import TokenFile
    from gptfast.tokenizer import Tokenizer

BYTES_PER_PROCESS = 2**25  # of text, for which starting a process pays


@dataclass(frozen=True)
class Data:
    """Write a corpus to a file, or your own texts as tokens to a folder."""


@dataclass(frozen=True)
class Abc(Data):
    """Write the abc corpus to a file; it is generated."""

    out: File = None  # where to write; None: in GPTFAST_DATA_DIR or the user's cache

    def run(self) -> int:
        """Writes the corpus, unless it is there; a file with another content stays as it is."""
        from gptfast import data

        return _write_corpus("abc", data.abc_corpus(), self.out)


@dataclass(frozen=True)
class Shakespeare(Data):
    """Write Tiny Shakespeare to a file; it is downloaded once."""

    # a copy to take instead of downloading it
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None
    out: File = None  # where to write; None: in GPTFAST_DATA_DIR or the user's cache

    def run(self) -> int:
        """Writes the corpus, unless it is there; a file with another content stays as it is."""
        from gptfast import data

        return _write_corpus("shakespeare", data.shakespeare(self.source), self.out)


@dataclass(frozen=True)
class Prepare(Data):
    """Write texts as tokens to a folder, from which training reads more than memory holds."""

    # UTF-8 files, each a document
    texts: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]  # the folder, which --data then takes
    # char: the texts' characters; bpe: byte pairs learnt from the texts; gpt2: GPT-2's, if it is in
    # Hugging Face's cache; or a tokenizer.json, another folder of tokens, or a model's, as a run, a
    # folder of Hugging Face or hf:OWNER/NAME
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|bpe|gpt2|PATH")] = "char"
    vocab_size: Count = None  # how many tokens bpe is to learn at most
    # a line that separates documents within a file; None: each file is one document
    separator: Annotated[str | None, tyro.conf.arg(metavar="LINE")] = None
    processes: Count = None  # that encode; None: as many as can run at once, fewer for short texts
    overwrite: bool = False  # replace the tokens in DIR

    def run(self) -> int:
        """Prepares the folder, and says what is in it."""
        from gptfast.data.prepare import check_folder, prepare

        if not self.texts:
            raise ConfigError("there is no text to prepare: name at least one file")
        check_folder(self.out, self.overwrite)
        sizes = [path.stat().st_size if path.is_file() else 0 for path in self.texts]
        processes = _processes(sum(sizes)) if self.processes is None else self.processes
        tokenizer = self._tokenizer(sum(sizes))
        with bar("encoding", sum(sizes), in_bytes=True) as read:
            found = prepare(
                self.texts,
                self.out,
                tokenizer,
                separator=self.separator,
                processes=processes,
                overwrite=self.overwrite,
                read=read,
            )
        _show(found)
        return 0

    def _tokenizer(self, size: int) -> "Tokenizer":
        """Makes or loads the tokenizer; `size` is the texts' number of bytes."""
        from gptfast.bpe import BPETokenizer
        from gptfast.data.prepare import pieces
        from gptfast.data.tokens import char_tokenizer

        if (self.tokenizer == "bpe") != (self.vocab_size is not None):
            raise ConfigError("--vocab-size N belongs to --tokenizer bpe, which needs it")
        if self.tokenizer not in ("char", "bpe"):
            return _stored_tokenizer(self.tokenizer)
        # (Reading reports files that are missing or directories.)
        if any(path.exists() and not path.is_file() and not path.is_dir() for path in self.texts):
            raise DataError("a text that a vocabulary is made of is read twice: give it as a file")
        with bar("reading the vocabulary", size, in_bytes=True) as read:
            texts = pieces(self.texts, self.separator, read)
            if self.vocab_size is None:
                return char_tokenizer(texts)
            return BPETokenizer.train(texts, self.vocab_size)


@dataclass(frozen=True)
class Check(Data):
    """Read a folder of tokens from end to end and compare it with its hash."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # the folder

    def run(self) -> int:
        """Says what is in the folder, once it is known to be right."""
        from gptfast.data.token_files import open_tokens, verify

        found = open_tokens(self.folder)
        verify(found)
        _show(found)
        return 0


def _show(found: "TokenFile") -> None:
    print(f"path        {found.path}")
    print(f"tokens      {len(found.ids):,} of a vocabulary of {found.tokenizer.vocab_size:,}")
    print(f"documents   {found.documents:,}")
    print(f"bytes       {found.ids.nbytes:,}")
    print(f"sha256      {found.sha256}")


DATA: dict[str, type[Command]] = {
    "abc": Abc,
    "shakespeare": Shakespeare,
    "prepare": Prepare,
    "check": Check,
}


def _stored_tokenizer(name: str) -> "Tokenizer":
    """Loads the tokenizer of a folder of tokens or of a model, or one that BPETokenizer knows."""
    from gptfast import formats
    from gptfast.bpe import BPETokenizer
    from gptfast.data.token_files import META_NAME, open_tokens

    path = Path(name)
    if (path / META_NAME).is_file():
        return open_tokens(path).tokenizer
    if not formats.names_model(name):
        return BPETokenizer.load(name)
    tokenizer = formats.tokenizer_of(name)
    if tokenizer is None:
        raise DataError(f"{name}: the model has no tokenizer")
    return tokenizer


def _processes(size: int) -> int:
    """How many processes are worth starting for so many bytes."""
    from gptfast.threads import limits

    return max(1, min(limits().usable, size // BYTES_PER_PROCESS))


def _write_corpus(name: str, text: str, out: Path | None) -> int:
    from gptfast import data

    corpus, content = data.CORPORA[name], text.encode("utf-8")
    path = out or data.data_dir() / corpus.file_name
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != corpus.sha256:
        raise DataError(f"the generated corpus has sha256 {sha256}, expected {corpus.sha256}")
    state = _write_new(path, content)
    print(f"path    {path} ({state})\nbytes   {len(content):,}\nsha256  {sha256}")
    return 0


def _write_new(path: Path, content: bytes) -> str:
    """Writes a file that is not there yet, whole or not at all, and returns what was done."""
    if path.exists():
        if path.is_file() and path.read_bytes() == content:
            return "was there already"
        raise DataError(f"{path} exists with another content: remove it, or give another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic({path: content})
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error
    return "written"
