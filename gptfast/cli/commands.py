"""The commands. Each is a dataclass: its fields are the options, their comments the help.

Nothing that loads torch is imported before a command runs, so that help comes at once.
"""

import hashlib
import math
import signal
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import tyro

from gptfast.errors import CheckpointError, ConfigError, DataError
from gptfast.files import write_atomic

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.model import GPT
    from gptfast.presets import Preset
    from gptfast.tokenizer import CharTokenizer
    from gptfast.training import UnsavedError

EXIT_SIGNAL = 128  # and the number of the signal that ended it
EXIT_INTERRUPTED = EXIT_SIGNAL + signal.SIGINT

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
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


@dataclass(frozen=True)
class Demo:
    """Train the course's model and compare it with the best possible, in under a minute."""

    seed: int = 1  # of the initial weights, the windows, the dropout and the samples
    threads: Count = None  # CPU threads; None: as many as can run at once

    def run(self) -> int:
        """Runs the demo; 1 if the model stayed too far from what it can reach."""
        from gptfast.cli.demo import demo

        use_threads(self.threads)
        return 0 if demo(self.seed).passed else 1


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


@dataclass(frozen=True)
class Train:
    """Train a model on a text by a preset."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]  # the run's directory
    compute: ComputeOptions
    data: File = None  # UTF-8 text; None: the preset's own text
    # start from the model of a run, or of any checkpoint directory: its weights, shape, tokenizer
    init_from: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    resume: bool = False  # go on with the interrupted run in DIR
    overwrite: bool = False  # replace the run in DIR
    plot: File = None  # draw the losses to this picture: .png, .svg or .pdf (needs matplotlib)

    def source(self) -> Path | None:
        """Returns the checkpoint whose shape the model has, None for that of the preset."""
        if self.init_from is None and not self.resume:
            return None
        from gptfast.training.training import source_of

        path, _ = source_of(self.init_from, self.out if self.resume else None)
        return None if path is None else Path(path)

    def fit(self, preset: "Preset", fields: dict[str, Any]) -> int:
        """Trains by a preset with these values in all fields of its configs.

        Returns:
            0, or 128 and the number of the signal that ended the run, as 130 after Ctrl-C.
        """
        from gptfast.pictures import check_picture
        from gptfast.training import UnsavedError, plots, train
        from gptfast.training.progress import handles_ctrl_c

        if self.plot is not None:  # what would fail after the training fails before it
            check_picture(self.plot)
        use_threads(self.compute.threads)
        try:
            with handles_ctrl_c():
                result = train(
                    preset,
                    self.out,
                    data=self.data,
                    init_from=self.init_from,
                    backend=self.compute.backend,
                    device=self.compute.device,
                    resume=self.resume,
                    overwrite=self.overwrite,
                    **fields,
                )
        except UnsavedError as error:
            raise _rescued(self.out, error) from error
        if self.plot is not None and result.history:
            plots.plot_history(result.history, self.plot)
        if not result.interrupted:
            print(f"saved in {self.out}")
        return 0 if result.signal is None else EXIT_SIGNAL + result.signal


def _rescued(out: Path, error: "UnsavedError") -> CheckpointError:
    """Saves the model of a run, whose directory does not take it, in another one, and says so."""
    from gptfast import checkpoint

    why = f"{out}: the last save failed ({error.__cause__})"
    try:
        place = tempfile.mkdtemp(prefix="gptfast-")
        checkpoint.save(error.result.model, error.result.tokenizer, place)
    except (OSError, CheckpointError) as again:
        return CheckpointError(f"{why}, and so did one elsewhere ({again})")
    return CheckpointError(f"{why}; the trained model is saved in {place}")


def train_preset(preset: "Preset", source: Path | None) -> type[Command]:
    """Makes the command that trains a preset, whose configs are the defaults of the options.

    Args:
        preset: The preset.
        source: The checkpoint whose shape the model has, see `Train.source`; None: the preset's.
    """
    from gptfast.config import GPTConfig, TrainConfig

    shape = preset.model if source is None else shape_of(source)

    @dataclass(frozen=True)
    class TrainPreset(Train):
        model: GPTConfig = shape
        train: TrainConfig = preset.train

        def run(self) -> int:
            return self.fit(preset, asdict(self.model) | asdict(self.train))

    TrainPreset.__doc__ = f"{Train.__doc__}\n\n{preset.name}: {preset.help}."
    return TrainPreset


@dataclass(frozen=True)
class Eval:
    """Measure a model on a text: loss, perplexity and bits per character."""

    run_path: Run  # a run of `gptfast train`, or any checkpoint directory
    compute: ComputeOptions
    data: File = None  # UTF-8 text; None: what the run held out of its own text
    # error: refuse a character that the model does not know; skip: leave it out of the text
    unknown: Literal["error", "skip"] = "error"

    def run(self) -> int:
        """Prints the numbers."""
        from gptfast.data import read_text
        from gptfast.training import evaluate, held_out

        use_threads(self.compute.threads)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        skipped = 0
        if self.data is None:
            ids = held_out(self.run_path)  # (N,)
        else:
            text = read_text(self.data)
            ids = tokenizer.encode_tensor(text, self.unknown)  # (N,)
            skipped = len(text) - len(ids)
        result = evaluate(model, ids)
        print(f"loss        {result.loss:.4f} nats per character")
        print(f"perplexity  {result.perplexity:.4f}")
        print(f"bits        {result.loss / math.log(2):.4f} per character")
        print(f"characters  {result.tokens:,}")
        if skipped:
            print(f"skipped     {skipped:,} characters that the vocabulary lacks")
        return 0


@dataclass(frozen=True)
class Generate:
    """Continue one or more prompts; a single one appears as it is generated."""

    run_path: Run  # a run of `gptfast train`, or any checkpoint directory
    compute: ComputeOptions
    prompt: Texts = ()  # text to continue; - reads it from standard input
    prompt_file: File = None  # a file whose text is a further prompt
    # error: refuse a character that the model does not know; skip: leave it out of the prompt
    unknown: Literal["error", "skip"] = "error"
    max_new_tokens: int = 100  # tokens to generate per prompt
    temperature: float = 1.0  # 0 takes the likeliest token; higher is more random
    top_k: Count = None  # draw from the N likeliest tokens; None or 0: from all
    top_p: Fraction = None  # draw from the likeliest tokens that together have this probability
    min_p: Fraction = None  # draw only tokens with this fraction of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1 makes tokens that came before less likely
    num_samples: int = 1  # texts per prompt
    seed: int = 0  # of the draws, not negative; equal seeds give equal texts
    stop: Texts = ()  # end before this text
    # what to do past the window: slide it by one token (exact) or by K (faster), end, or refuse
    overflow: Annotated[str, tyro.conf.arg(metavar="recompute|stride:K|stop|error")] = "recompute"
    dtype: Literal["fp32", "bf16", "int8"] | None = None  # of the weights; None: the model's own

    def run(self) -> int:
        """Prints prompts and continuations."""
        from gptfast.generation import generate, stream

        prompts = self._prompts()
        use_threads(self.compute.threads)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        prompts = [tokenizer.decode(tokenizer.encode(text, self.unknown)) for text in prompts]
        names = "max_new_tokens temperature top_k top_p min_p repetition_penalty num_samples seed"
        options: dict[str, Any] = {
            name: getattr(self, name) for name in [*names.split(), "overflow", "dtype"]
        }
        options |= {"tokenizer": tokenizer, "stop": self.stop}
        if len(prompts) == 1 and self.num_samples == 1:
            pieces = stream(model, prompts[0], **options)  # checks all before the first output
            _write([prompts[0]])
            _write(str(piece) for piece in pieces)
            _write(["\n"])
            return 0
        results = generate(model, prompts, **options)
        for i, result in enumerate(results):
            prompt = prompts[i // self.num_samples]
            _write([f"--- {i + 1} of {len(results)}\n{prompt}{result.text}\n"])
        interrupted = any(result.finish_reason == "interrupted" for result in results)
        return EXIT_INTERRUPTED if interrupted else 0

    def _prompts(self) -> list[str]:
        from gptfast.data import read_text, without_byte_order_mark

        prompts = [
            without_byte_order_mark(sys.stdin.read()) if text == "-" else text
            for text in self.prompt
        ]
        if self.prompt_file is not None:
            prompts.append(read_text(self.prompt_file))
        if not prompts:
            raise ConfigError("there is no prompt: give --prompt TEXT or --prompt-file FILE")
        return prompts


@dataclass(frozen=True)
class Inspect:
    """Show what is in a checkpoint: parameters, tokenizer, configuration."""

    run_path: Run  # a run of `gptfast train`, or any checkpoint directory
    # show, in tenths, what each character of TEXT attends to, and the entropy of that
    attention: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    # show what each head adds at character N of TEXT: 0 is the first one, -1 the last
    contributions: Count = None
    # draw the attention, or the contributions where they are asked for, to this picture: .png, .svg
    # or .pdf (needs matplotlib)
    plot: File = None

    def run(self) -> int:
        """Prints the tables."""
        if self.attention is None:
            for option in ("contributions", "plot"):
                if getattr(self, option) is not None:
                    raise ConfigError(f"--{option} needs --attention TEXT")
        if self.plot is not None:
            from gptfast.pictures import check_picture

            check_picture(self.plot)
        from rich.console import Console

        from gptfast import checkpoint
        from gptfast.cli.inspection import attention_report, lines_of, parameter_table

        model, tokenizer = checkpoint.load(self.run_path)
        attention = ""
        if self.attention is not None:
            attention = attention_report(
                model, tokenizer, self.attention, self.contributions, self.plot
            )
        Console().print(parameter_table(model))
        header = checkpoint.read_config(self.run_path)
        chars = "none"
        if tokenizer is not None:
            chars = f"{tokenizer.vocab_size} ids: <PAD> and {''.join(tokenizer.chars)!r}"
        print(f"\ntokenizer: {chars}")
        for title in ("config", "extra"):
            values = header[title]
            print(f"\n{title}:")
            for line in lines_of(values):
                print(f"  {line}")
        print(attention, end="")
        return 0


@dataclass(frozen=True)
class Info:
    """Show the installation and the machine, and why something is missing."""

    def run(self) -> int:
        """Prints the table of `gptfast.cli.info`."""
        from gptfast.info import print_info

        print_info()
        return 0


def use_threads(threads: int | None) -> None:
    """Sets torch's number of threads; None takes as many as can run at once."""
    import torch

    from gptfast.threads import check_threads, use_usable_threads

    if threads is None:
        use_usable_threads()
    else:
        torch.set_num_threads(check_threads("--threads", threads))


def load_text_model(path: Path, compute: Compute | None = None) -> "tuple[GPT, CharTokenizer]":
    """Loads a checkpoint that must have a tokenizer, and chooses how its model computes."""
    from gptfast import checkpoint

    device = "cpu" if compute is None else compute.device
    model, tokenizer = checkpoint.load(path, device)
    if tokenizer is None:
        raise CheckpointError(f"{path}: the checkpoint has no tokenizer, so it cannot take text")
    if compute is not None:
        model.backend = compute.backend
    return model, tokenizer


def shape_of(path: Path) -> "GPTConfig":
    """The shape of a checkpoint's model."""
    from gptfast import checkpoint
    from gptfast.config import GPTConfig

    return GPTConfig.from_dict(checkpoint.read_config(path)["config"])


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


def _write_new(path: Path, content: bytes) -> str:
    """Writes a file that is not there yet, whole or not at all, and returns what was done."""
    if path.exists():
        if path.is_file() and path.read_bytes() == content:
            return "was there already"
        raise DataError(f"{path} exists with another content: remove it, or give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic({path: content})
    return "written"
