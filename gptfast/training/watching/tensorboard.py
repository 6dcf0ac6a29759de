"""A run in TensorBoard. Requires the extra `tensorboard`."""

from pathlib import Path
from typing import TYPE_CHECKING

from gptfast.errors import ConfigError
from gptfast.training.watching.tracker import Tracker

if TYPE_CHECKING:
    from gptfast.training.loop import Loop

FOLDER_NAME = "tensorboard"
EVENTS = "events.out.tfevents.*"


class TensorBoard(Tracker):
    """Writes a run's numbers where `tensorboard --logdir DIR` finds them.

    A run that goes on replaces what was written of the steps that it trains again.

    Args:
        directory: The folder; None: `tensorboard` in the run's directory. Event files of an earlier
            run there are removed by a run that starts anew.
        every: How many steps to average for each loss that is written.

    Raises:
        ConfigError: The package is missing; at the start, neither directory is known.
    """

    def __init__(self, directory: str | Path | None = None, every: int = 10) -> None:
        super().__init__(every)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorBoard's package is missing: pip install 'gptfast-kernels[tensorboard]'"
            ) from None
        self._directory = None if directory is None else Path(directory)
        self._open = SummaryWriter

    def on_start(self, run: "Loop") -> None:
        """Opens the file of events."""
        directory = self._directory
        if directory is None:
            if run.path is None:
                raise ConfigError("TensorBoard needs a directory: the run's (out) or its own")
            directory = run.path / FOLDER_NAME
        if run.state.step == 0:
            for file in directory.glob(EVENTS):
                file.unlink()
        self._writer = self._open(directory, purge_step=run.state.step + 1)

    def send(self, step: int, numbers: dict[str, float]) -> None:
        """Writes them as scalars."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, run: "Loop") -> None:
        """Writes what is left and closes the file."""
        self._writer.close()
