"""What commands and runs show: on rich's console, and as lines on stderr that nobody may read."""

import contextlib
import sys

import rich.console


class Console(rich.console.Console):
    """rich's console, which ends the process where a reader has gone, but as an error of ours."""

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError again, which `gptfast.cli` turns into its exit code."""
        raise  # noqa: PLE0704 (rich calls this where it handles the error)


def say(line: str) -> None:
    """Prints a line on stderr; a terminal that has gone or a full disk does not end a run."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # the latter of a stream that is closed
            print(line, file=sys.stderr, flush=True)
