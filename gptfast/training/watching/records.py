"""Records in a run's directory besides the checkpoint: the machine and the curves."""

import json
from typing import TYPE_CHECKING

from gptfast.errors import reason
from gptfast.files import write_atomic
from gptfast.pictures import can_draw
from gptfast.training.callbacks import Callback
from gptfast.training.plots import plot_history
from gptfast.training.run import MACHINE_NAME, PLOT_NAME
from gptfast.training.watching import machine

if TYPE_CHECKING:
    from gptfast.training.loop import Loop


class Records(Callback):
    """Writes `machine.json` at the start and, where matplotlib is, `loss.png` at the end."""

    def on_start(self, run: "Loop") -> None:
        """Writes the card of the machine that trains now."""
        if run.path is None:
            return
        card = machine.card(run.trainer.device, run.config.precision)
        content = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        try:
            write_atomic({run.path / MACHINE_NAME: content.encode("utf-8")})
        except OSError as error:
            run.warn(f"{run.path / MACHINE_NAME}: cannot be written ({reason(error)})")

    def on_end(self, run: "Loop") -> None:
        """Draws the losses, once there are two evaluations."""
        rows, path = run.state.history, run.path
        if path is None or run.error is not None or len(rows) < 2:
            return
        if not can_draw():
            return
        try:
            plot_history(rows, path / PLOT_NAME, title=path.absolute().name)
        except Exception as error:  # a run does not fail for a picture
            why = str(error).partition("\n")[0]
            run.warn(f"{path / PLOT_NAME}: cannot be drawn ({why})")
