"""The progress bar of a run in a notebook."""

import html
import sys
import time
from collections import deque

MOST_LINES = 12  # above the bar
STYLE = "margin: 0; line-height: normal; font-family: monospace"  # frontends differ in these


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookBar:
    """A bar below the cell, with the last lines above it, in one output that is replaced.

    It is plain HTML, which every frontend shows without widgets. When the run has ended, the
    notebook keeps text only.

    Args:
        total: Steps of the run.
        completed: Steps that are done already.
    """

    def __init__(self, total: int, completed: int) -> None:
        from IPython.display import display

        self._total, self._completed, self._first = total, completed, completed
        self._numbers, self._running = "", True
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._left_out = 0
        self._start = time.perf_counter()
        self._output = display(self._content(), raw=True, display_id=True)

    def line(self, text: str) -> None:
        """Shows a line above the bar; the oldest one goes where there are too many."""
        self._left_out += len(self._lines) == MOST_LINES
        self._lines.append(text)
        self._show()

    def update(self, completed: int, numbers: str | None = None) -> None:
        """Shows how many steps are done, and the numbers beside the bar if they have changed."""
        self._completed = completed
        if numbers is not None:
            self._numbers = numbers
        self._show()

    def stop(self) -> None:
        """Ends the bar; its numbers stay."""
        self._running = False
        self._show()

    def _show(self) -> None:
        self._output.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        """What is shown, by its type."""
        above = [f"({self._left_out} lines before)"] if self._left_out else []
        lines = "\n".join([*above, *self._lines])
        beside = f"{self._completed}/{self._total}  {self._numbers}{self._left()}".rstrip()
        bar = f'<progress value="{self._completed}" max="{self._total}"></progress>  '
        above_bar = f"{html.escape(lines)}\n" if lines else ""
        shown = f"{above_bar}{bar * self._running}{html.escape(beside)}"
        return {
            "text/plain": f"{lines}\n{beside}".lstrip(),
            "text/html": f'<pre style="{STYLE}">{shown}</pre>',
        }

    def _left(self) -> str:
        """The time that the rest will take, if it takes as long per step as the steps so far."""
        done = self._completed - self._first
        if not self._running or not done:
            return ""
        seconds = (time.perf_counter() - self._start) * (self._total - self._completed) / done
        minutes, seconds = divmod(round(seconds), 60)
        return f"  {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
