"""Named corpora: where they come from, and the hashes by which they are known."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gptfast.data.texts import read_bytes
from gptfast.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """A known corpus: the hash of its file and its download URLs (none if it is generated)."""

    name: str
    file_name: str
    num_bytes: int
    sha256: str
    urls: tuple[str, ...] = ()


CORPORA = {
    "abc": Corpus(
        name="abc",
        file_name="abc.txt",
        num_bytes=1_079_918,
        sha256="bbb7a80ab43426fada8beeb2800fd0102b809d852e49b877dcd1d859f2b036a7",
    ),
    "shakespeare": Corpus(
        name="shakespeare",
        file_name="shakespeare.txt",
        num_bytes=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        urls=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
        ),
    ),
}


def data_dir() -> Path:
    """Returns the folder of downloads: `GPTFAST_DATA_DIR`, or a folder in the user's cache."""
    chosen = os.environ.get("GPTFAST_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser()
    import pooch  # here, because only downloads need it

    return Path(pooch.os_cache("gptfast"))


def shakespeare(source: str | Path | None = None) -> str:
    """Returns Tiny Shakespeare, downloaded once or read from a file; checks its SHA-256.

    Args:
        source: A file with the text; None reads it from `data_dir()`, after a download if needed.

    Raises:
        DataError: The file's hash is wrong, it cannot be read, or the download fails.
    """
    corpus = CORPORA["shakespeare"]
    if source is not None:
        return _read_checked(corpus, Path(source))
    path = data_dir() / corpus.file_name
    if not path.exists():
        _download(corpus, path)
    return _read_checked(corpus, path)


def _read_checked(corpus: Corpus, path: Path) -> str:
    data = read_bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != corpus.sha256:
        raise DataError(
            f"{path} is not the corpus {corpus.name!r}: expected {corpus.num_bytes:,} bytes with "
            f"sha256 {corpus.sha256[:12]}…, got {len(data):,} bytes with sha256 {sha256[:12]}…"
        )
    return data.decode("utf-8")


def _download(corpus: Corpus, path: Path) -> None:
    import pooch

    reasons = []
    for url in corpus.urls:
        try:
            pooch.retrieve(
                url, known_hash=f"sha256:{corpus.sha256}", fname=path.name, path=path.parent
            )
        except (OSError, ValueError) as error:
            # pooch raises OSError (from requests) for network errors, ValueError for a wrong hash.
            reasons.append(f"{url.split('/')[2]}: {type(error).__name__}")
        else:
            return
    raise DataError(
        f"the corpus {corpus.name!r} could not be downloaded to {path} ({'; '.join(reasons)}): "
        f"give a copy with `gptfast data {corpus.name} --from FILE`, or with --data FILE to "
        "`gptfast train` or `gptfast reproduce`, "
        f"or set GPTFAST_DATA_DIR to a folder that has {path.name}"
    )
