"""Trains a step on a long text and prints the memory that it took, in bytes a character.

test_token_files.py runs it in a process of its own: FILE, and how the text is given and trained.
"""

import os
import signal
import sys
from pathlib import Path

from gptfast.data import read_text
from gptfast.training import Trainer, train

SHAPE = {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8, "dropout": 0.0}


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(file: str, given: str, by: str) -> None:
    length = {"steps": 1} if by == "steps" else {"steps": None, "epochs": 1}
    options = SHAPE | length | {"batch_size": 4, "progress": False}
    train("abc", text="AB" * 100, **(options | {"steps": 1}))  # loads and warms up
    step_at = Trainer.step_at

    def last_step(self, ids, starts):
        os.kill(os.getpid(), signal.SIGTERM)  # which ends the run after this step
        return step_at(self, ids, starts)

    Trainer.step_at = last_step
    before = peak()
    if given == "text":
        result = train("abc", text=read_text(file), **options)
    else:
        result = train("abc", data=file, **options)
    assert result.signal == signal.SIGTERM
    print((peak() - before) / Path(file).stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
