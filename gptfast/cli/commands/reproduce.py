"""`gptfast reproduce`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptfast.cli.options import EXIT_SIGNAL, ComputeOptions, File, use_threads


@dataclass(frozen=True)
class Reproduce:
    """Train the course's two exercises and compare them with the course's results."""

    compute: ComputeOptions
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3  # train each by the seeds 0 to N - 1
    data: File = None  # a copy of Tiny Shakespeare; None: downloads it
    # where runs and report go; finished runs that are there are kept, interrupted ones go on
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/reproduction")

    def run(self) -> int:
        """Trains and writes the report; 1 if the course's loss is not reached."""
        from gptfast.reproduction import reproduce
        from gptfast.training.signals import handles_ctrl_c

        use_threads(self.compute.threads)
        with handles_ctrl_c():
            found = reproduce(
                self.out,
                seeds=self.seeds,
                data=self.data,
                backend=self.compute.backend,
                device=self.compute.device,
            )
        if found.signal is not None:
            return EXIT_SIGNAL + found.signal
        print(f"the report is in {found.report}")
        return 0 if found.agrees else 1
