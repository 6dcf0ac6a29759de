"""Named corpora, text files, and batches of training windows.

Letters: B batch, T block_size, N tokens of a text.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast.abc_corpus import abc_corpus, abc_entropy, abc_next_distribution
from gptfast.checks import as_int
from gptfast.errors import DataError

__all__ = [
    "CORPORA",
    "Corpus",
    "EpochWindows",
    "abc_corpus",
    "abc_entropy",
    "abc_next_distribution",
    "data_dir",
    "epoch_windows",
    "random_windows",
    "read_text",
    "shakespeare",
]


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
    import pooch  # here, because training on texts of one's own needs no downloads

    return Path(pooch.os_cache("gptfast"))


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a text file, got a directory") from None
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error
    if not data:
        raise DataError(f"{path}: the file is empty")
    return data


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file: keeps line ends as they are, removes a byte order mark.

    Raises:
        DataError: if the file is missing, a directory, unreadable, empty or not UTF-8.
    """
    data = _read_bytes(Path(path))
    try:
        text = without_byte_order_mark(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    if not text:
        raise DataError(f"{path}: the file is empty but for a byte order mark")
    return text


def without_byte_order_mark(text: str) -> str:
    """Removes the byte order mark that some editors write at the start of a file."""
    return text.removeprefix("\ufeff")


def shakespeare(source: str | Path | None = None) -> str:
    """Returns Tiny Shakespeare, downloaded once or read from a file; checks its SHA-256.

    Args:
        source: a file with the text; None reads it from `data_dir()`, after a download if needed.

    Raises:
        DataError: if the file's hash is wrong, it cannot be read, or the download fails.
    """
    corpus = CORPORA["shakespeare"]
    if source is not None:
        return _read_checked(corpus, Path(source))
    path = data_dir() / corpus.file_name
    if not path.exists():
        _download(corpus, path)
    return _read_checked(corpus, path)


def _read_checked(corpus: Corpus, path: Path) -> str:
    data = _read_bytes(path)
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
        f"give a copy with --from FILE, or set GPTFAST_DATA_DIR to a folder that has {path.name}"
    )


def _num_windows(ids: torch.Tensor, block_size: int) -> int:
    if not isinstance(ids, torch.Tensor):
        raise DataError(f"windows: ids must be a 1-D int64 tensor, got {type(ids).__name__}")
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise DataError(
            f"windows: ids must be a 1-D int64 tensor, got {ids.dim()}-D {str(ids.dtype)[6:]}"
        )
    if len(ids) <= block_size:
        raise DataError(
            f"the text is shorter than a window: it has {len(ids)} tokens and a window needs "
            f"{block_size + 1} (block_size {block_size} and the token after it)"
        )
    return len(ids) - block_size


def _size(name: str, value: int) -> int:
    count = as_int(value)
    if count is None or count < 1:
        raise DataError(f"windows: {name} must be a whole number, at least 1, got {value!r}")
    return count


def gather(
    ids: torch.Tensor, starts: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the windows of a text that start at `starts`.

    Args:
        ids: tokens of the text, (N,) int64.
        starts: (B,) int64, in [0, N - T); copied to the device of `ids`, if it is elsewhere.
        block_size: T, the length of a window.

    Returns:
        inputs and targets (the inputs shifted by one), each (B, T) int64 on the device of `ids`.
    """
    first = torch.arange(2, device=ids.device)[:, None, None]
    at = starts.to(ids.device)[:, None] + torch.arange(block_size, device=ids.device)  # (B, T)
    idx, targets = ids[at + first]
    return idx, targets


def random_starts(
    ids: torch.Tensor, block_size: int, batch_size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws where the windows of `random_windows` start: (B,) int64 on the generator's device."""
    block_size, batch_size = _size("block_size", block_size), _size("batch_size", batch_size)
    total = _num_windows(ids, block_size)
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randint(total, (batch_size,), generator=generator, device=device)


def random_windows(
    ids: torch.Tensor, block_size: int, batch_size: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `batch_size` windows whose starts are independent and uniformly distributed.

    Args:
        ids: tokens of the text, (N,) int64.
        block_size: T, the length of a window.
        batch_size: B.
        generator: the source of the starts; torch's default generator if None.

    Returns:
        inputs and targets (the inputs shifted by one), each (B, T) int64 on the device of `ids`.

    Raises:
        DataError: if the text is shorter than T + 1, a size is below 1, or `ids` is not 1-D int64.
    """
    return gather(ids, random_starts(ids, block_size, batch_size, generator), block_size)


class EpochWindows:
    """Iterates over all windows of a text in batches; each iteration is one epoch in a new order.

    Args:
        ids: tokens of the text, (N,) int64.
        block_size: T, the length of a window.
        batch_size: B; the last batch of an epoch may be smaller.
        generator: the source of a new random order per epoch; None keeps the order of the text.
        stride: distance between starts; 1 gives all N - T windows, T gives disjoint targets.

    Raises:
        DataError: if the text is shorter than T + 1, a size is below 1, or `ids` is not 1-D int64.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        block_size: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        stride: int = 1,
    ) -> None:
        self.ids = ids
        self.block_size = _size("block_size", block_size)
        self.batch_size = _size("batch_size", batch_size)
        self.generator = generator
        self.stride = _size("stride", stride)
        self.num_windows = -(-_num_windows(ids, self.block_size) // self.stride)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return (self.num_windows + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields inputs and targets, each (B, T) int64 on the device of `ids`."""
        for starts in self.starts():
            yield gather(self.ids, starts, self.block_size)

    def starts(self) -> Iterator[torch.Tensor]:
        """Yields where the windows of each batch of an epoch start, (B,) int64 each."""
        if self.generator is None:
            order = torch.arange(self.num_windows)
        else:
            order = torch.randperm(
                self.num_windows, generator=self.generator, device=self.generator.device
            )
        for chosen in order.split(self.batch_size):
            yield chosen * self.stride


def epoch_windows(
    ids: torch.Tensor, block_size: int, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Returns an iterator over one epoch of `EpochWindows`; without generator in text order."""
    return iter(EpochWindows(ids, block_size, batch_size, generator))
