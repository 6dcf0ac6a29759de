"""`gptfast train`."""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptfast.cli.options import (
    EXIT_SIGNAL,
    ComputeOptions,
    File,
    TextOrTokens,
    shape_of,
    use_threads,
)
from gptfast.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gptfast.cli.run_options import RunOptions
    from gptfast.presets import Preset
    from gptfast.training import Callback, UnsavedError


@dataclass(frozen=True)
class Train:
    """Train a model on a text by a preset."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]  # the run's directory
    compute: ComputeOptions
    # options from a TOML file, such as the run.toml of another run; those given here win over it
    config: File = None
    # UTF-8 text, or a folder by `gptfast data prepare`; None: the preset's own text
    data: TextOrTokens = None
    # start from the weights, shape and tokenizer of a model: of a run, of a folder of Hugging Face
    # or nanoGPT, or hf:OWNER/NAME
    init_from: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    resume: bool = False  # go on with the interrupted run in DIR
    overwrite: bool = False  # replace the run in DIR
    plot: File = None  # draw the losses to this picture: .png, .svg or .pdf (needs matplotlib)
    tensorboard: bool = False  # write the losses to DIR/tensorboard, for TensorBoard
    # send the losses to this project of Weights & Biases
    wandb: Annotated[str | None, tyro.conf.arg(metavar="PROJECT")] = None

    def source(self) -> Path | None:
        """Returns the place of the model whose shape this one takes; None: the preset's."""
        if self.init_from is None and not self.resume:
            return None
        from gptfast.training.training import source_of

        path, _ = source_of(self.init_from, self.out if self.resume else None)
        return None if path is None else Path(path)

    def fit(self, preset: "Preset", fields: dict[str, Any], threads: int | None) -> int:
        """Trains by a preset with these values in all fields of its configs.

        Args:
            preset: The preset.
            fields: The values.
            threads: How many threads `fields` have if no option says so.

        Returns:
            0, or 128 and the number of the signal that ended the run, as 130 after Ctrl-C.
        """
        from gptfast.pictures import check_picture
        from gptfast.training import UnsavedError, plots, train
        from gptfast.training.distributed import is_first
        from gptfast.training.signals import handles_ctrl_c

        if self.plot is not None:  # what would fail after the training fails before it
            check_picture(self.plot)
        own = self.compute.threads
        if own is not None:  # of several processes, each takes its share otherwise
            if fields["threads"] not in (threads, own):
                raise ConfigError("--threads and --train.threads are the same: give one of them")
            fields = fields | {"threads": own}
        use_threads(own)
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
                    callbacks=self._trackers(),
                    **fields,
                )
        except UnsavedError as error:
            raise _rescued(self.out, error) from error
        if is_first():
            if not result.interrupted:
                print(f"saved in {self.out}")
            if self.plot is not None and result.history:
                plots.plot_history(result.history, self.plot)
        return 0 if result.signal is None else EXIT_SIGNAL + result.signal

    def _trackers(self) -> "list[Callback]":
        """Makes the callbacks that send the run's numbers to other programs."""
        from gptfast.training import TensorBoard, WandB

        trackers: list[Callback] = [TensorBoard()] if self.tensorboard else []
        return trackers if self.wandb is None else [*trackers, WandB(self.wandb)]


def _rescued(out: Path, error: "UnsavedError") -> CheckpointError:
    """Saves the model of a run, whose directory does not take it, in another one, and says so."""
    from gptfast import checkpoint

    why, place = f"{out}: the last save failed ({error.__cause__})", None
    try:
        place = tempfile.mkdtemp(prefix="gptfast-")
        checkpoint.save(error.result.model, error.result.tokenizer, place)
    except (OSError, CheckpointError) as again:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        return CheckpointError(f"{why}, and so did one elsewhere ({again})")
    return CheckpointError(f"{why}; the trained model is saved in {place}")


def train_preset(preset: "Preset", source: Path | None, file: "RunOptions") -> type[Train]:
    """Makes the command that trains a preset, whose configs are the defaults of the options.

    Args:
        preset: The preset.
        source: Where the model is whose shape this one has, see `Train.source`; None: the preset's.
        file: Has other defaults.
    """
    from gptfast.config import GPTConfig, TrainConfig

    shape = preset.model if source is None else shape_of(source)
    options = file.configured("train", preset.train)

    @dataclass(frozen=True)
    class TrainPreset(Train):
        model: GPTConfig = file.configured("model", shape)
        train: TrainConfig = options

        def run(self) -> int:
            return self.fit(preset, asdict(self.model) | asdict(self.train), options.threads)

    TrainPreset.__doc__ = f"{Train.__doc__}\n\n{preset.name}: {preset.help}."
    return TrainPreset
