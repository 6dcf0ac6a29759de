"""What the commands share: types of options, threads, models from checkpoints, a bar.

Nothing that loads torch is imported before a command runs, so that help comes at once.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import tyro

from gptfast.errors import CheckpointError

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.model import GPT
    from gptfast.tokenizer import Tokenizer

TYRO_CONFIG = (tyro.conf.FlagCreatePairsOff,)  # how options are made of fields

EXIT_SIGNAL = 128  # and the number of the signal that ended it
EXIT_INTERRUPTED = EXIT_SIGNAL + signal.SIGINT

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
TextOrTokens = Annotated[Path | None, tyro.conf.arg(metavar="FILE|DIR")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Fraction = Annotated[float | None, tyro.conf.arg(metavar="P")]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]


class Command(Protocol):
    """What the command line needs of a command."""

    def run(self) -> int:
        """Does the work and returns the exit code."""
        ...


@dataclass(frozen=True)
class Compute:
    """How it computes."""

    threads: Count = None  # CPU threads; None: as many as can run at once
    # fused: the kernels; reference: plain torch; auto: the kernels where they can run
    backend: Literal["auto", "fused", "reference"] = "auto"
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "cpu"  # or cuda, as torch names it


ComputeOptions = Annotated[Compute, tyro.conf.OmitArgPrefixes]


def use_threads(threads: int | None) -> None:
    """Sets torch's number of threads; None takes as many as can run at once."""
    import torch

    from gptfast.threads import check_threads, use_usable_threads

    if threads is None:
        use_usable_threads()
    else:
        torch.set_num_threads(check_threads("--threads", threads))


def load_text_model(path: Path, compute: Compute | None = None) -> "tuple[GPT, Tokenizer]":
    """Loads a model that must have a tokenizer, and chooses how it computes."""
    from gptfast import formats

    device = "cpu" if compute is None else compute.device
    model, tokenizer = formats.load(path, device)
    if tokenizer is None:
        raise CheckpointError(f"{path}: the model has no tokenizer, so it cannot take text")
    if compute is not None:
        model.backend = compute.backend
    return model, tokenizer


def shape_of(path: Path) -> "GPTConfig":
    """The shape of a model."""
    from gptfast import formats

    return formats.config_of(path)


@contextmanager
def bar(what: str, size: int, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows a bar in a terminal; yields what advances it.

    Args:
        what: What is being done.
        size: How many bytes or other items there are; 0: it is not known.
        in_bytes: Whether they are bytes.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from gptfast.console import Console

    numbers = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = TextColumn(what), BarColumn(), numbers, TimeRemainingColumn()
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as shown:
        task = shown.add_task("", total=size or None)
        yield lambda count: shown.advance(task, count)
