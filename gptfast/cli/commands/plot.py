"""`gptfast plot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptfast.errors import ConfigError


@dataclass(frozen=True)
class Plot:
    """Compare the curves of one or more runs in a picture (needs matplotlib)."""

    # directories of runs, up to 7
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]  # the picture: .png, .svg or .pdf
    # what to draw against the steps; lr: the learning rate
    show: Literal["loss", "perplexity", "lr"] = "loss"

    def run(self) -> int:
        """Draws the picture."""
        from gptfast.training.plots import plot_history

        if not self.runs:
            raise ConfigError("there is no run: gptfast plot RUN [RUN ...] --out FILE")
        print(f"drawn in {plot_history(self.runs, self.out, quantity=self.show)}")
        return 0
