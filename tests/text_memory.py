"""Trains a step on a long text of ASCII and prints the memory that it takes, in bytes a character.

test_token_files.py runs it in a process of its own, on Linux, with the path of the text.
"""

import os
import signal
import sys
from pathlib import Path

from gptfast.training import Trainer, train

OPTIONS = {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8, "batch_size": 4}
OPTIONS |= {"progress": False, "val_fraction": 0.1}
RUNS = {"steps": {"steps": 2}, "epochs": {"steps": None, "epochs": 1}}


def memory(kind: str) -> int:
    """The memory that this process has (VmRSS), or has had since `reset` (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def reset() -> int:
    """Forgets the most memory that this process has had; returns what it has."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def stop_after_a_step() -> None:
    """Lets every run end after its first step."""
    step_at = Trainer.step_at

    def last(self, ids, starts):
        os.kill(os.getpid(), signal.SIGTERM)
        return step_at(self, ids, starts)

    Trainer.step_at = last


def main(file: str) -> None:
    train("abc", text="AB" * 10_000, **OPTIONS, **RUNS["steps"])  # loads all modules
    stop_after_a_step()
    text = Path(file).read_text()
    for name, run in RUNS.items():
        for given in ("data", "text"):
            before = reset()
            result = train("abc", **{given: file if given == "data" else text}, **OPTIONS, **run)
            assert result.signal == signal.SIGTERM
            taken = (memory("VmHWM") - before) / len(text)
            print(name, given, taken + (given == "text"))  # a byte a character is the text itself


if __name__ == "__main__":
    main(*sys.argv[1:])
