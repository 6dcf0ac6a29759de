"""`gptfast data`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptfast.cli.options import File
from gptfast.errors import ConfigError, DataError
from gptfast.files import write_atomic


@dataclass(frozen=True)
class Data:
    """Write a corpus to a file and check its hash."""

    name: Annotated[Literal["abc", "shakespeare"], tyro.conf.Positional]  # the corpus
    # a copy of shakespeare to take instead of downloading it (abc is generated, not downloaded)
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None
    out: File = None  # where to write; None: in GPTFAST_DATA_DIR or the user's cache

    def run(self) -> int:
        """Writes the corpus, unless it is there; a file with another content stays as it is."""
        from gptfast import data

        corpus = data.CORPORA[self.name]
        if self.name == "abc" and self.source is not None:
            raise ConfigError("--from is for shakespeare: abc is generated, not downloaded")
        path = self.out or data.data_dir() / corpus.file_name
        text = data.abc_corpus() if self.name == "abc" else data.shakespeare(self.source)
        content = text.encode("utf-8")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic({path: content})
    return "written"
