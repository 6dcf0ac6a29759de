"""A run in Weights & Biases. Requires the extra `wandb`."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from gptfast.errors import ConfigError
from gptfast.training.watching.tracker import Tracker

if TYPE_CHECKING:
    from gptfast.training.loop import Loop


class WandB(Tracker):
    """Sends a run's options and numbers to Weights & Biases, as `wandb login` has set it up.

    With WANDB_MODE=offline they stay in the run's directory. A run that goes on goes on there too.

    Args:
        project: The project's name there.
        every: How many steps to average for each loss that is sent.

    Raises:
        ConfigError: The package is missing.
    """

    def __init__(self, project: str, every: int = 10) -> None:
        super().__init__(every)
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "the package of Weights & Biases is missing: pip install 'gptfast-kernels[wandb]'"
            ) from None
        self._open = wandb.init
        self.project = project

    def on_start(self, run: "Loop") -> None:
        """Starts the run there, or goes on with it."""
        self._run = self._open(
            project=self.project,
            id=run.directory.id,
            name=None if run.path is None else run.path.absolute().name,
            dir=run.path,
            config={"model": run.model.config.to_dict(), "train": asdict(run.config)},
            resume="allow",
            reinit="create_new",
        )

    def send(self, step: int, numbers: dict[str, float]) -> None:
        """Sends them."""
        self._run.log(numbers, step=step)

    def on_end(self, run: "Loop") -> None:
        """Ends the run there, after it has sent what is left."""
        self._run.finish(exit_code=0 if run.error is None else 1)
