"""Kills runs of training at random moments; each must go on to the bits it would have had.

    python tests/kill_runs.py            `make test-kill`: 100 times, in a few minutes
    python tests/kill_runs.py 20 7       20 times, with 7 as the seed of the moments

A run saves every few steps. It is killed (kill -9), what lies in its directory is read, and it is
resumed and killed again until it ends. Then weights and history are compared with those of a run
that nobody disturbed. A run that is killed before its first save starts anew.
"""

import multiprocessing
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gptfast
from gptfast.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from gptfast.config import GPTConfig, TrainConfig
from gptfast.presets import Preset
from gptfast.training import train
from gptfast.training.callbacks import Callback
from gptfast.training.run import BEST_NAME, STATE_NAME

RECIPE = Preset(
    name="kill",
    model=GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1),
    train=TrainConfig(
        lr=1e-2, schedule="cosine", warmup_steps=9, ema=0.9, batch_size=4, steps=90,
        eval_every=10, save_every=3, threads=1,
    ),
)  # fmt: skip
TEXT = "".join(random.Random(0).choices("ABC\n", k=2000))
KILLED = -signal.SIGKILL  # an exit code
TIMES = ("seconds", "per_s")  # in the names of a row's entries that say how long it took
# Processes are forked from one that has imported everything, and has computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["gptfast.training.training", "torch._dynamo", "matplotlib.backends.backend_agg"]
)


@dataclass
class Outcome:
    """What happened to runs that were killed."""

    kills: int = 0
    before_a_save: int = 0  # kills after which there was nothing to go on from
    ended: int = 0  # runs that came to their end
    wrong: list[str] = field(default_factory=list)  # sentences on what must not happen


class Tell(Callback):
    """Sets an event when the steps begin."""

    def __init__(self, begun: Any) -> None:
        self.begun = begun

    def on_start(self, run: Any) -> None:
        self.begun.set()


def work(path: Path, begun: Any) -> None:
    """Starts the run in a directory, or goes on with it. Runs in a process of its own."""
    resume = (path / STATE_NAME).is_file()
    options: Any = {"progress": False, "resume": resume, "overwrite": not resume}
    train(RECIPE, path, text=TEXT, callbacks=[Tell(begun)], **options)


def worked(path: Path, seconds: float | None = None) -> tuple[int | None, float]:
    """Lets a process work, and kills it `seconds` after it began with its steps.

    Returns:
        its exit code, and how long its steps took.
    """
    begun = PROCESSES.Event()
    process = PROCESSES.Process(target=work, args=(path, begun))
    process.start()
    while not begun.wait(0.1) and process.is_alive():
        pass
    start = time.monotonic()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode, time.monotonic() - start


def unreadable(path: Path) -> str | None:
    """Returns why a checkpoint of the run cannot be read; None if all can that are there."""
    for folder in (path, path / BEST_NAME):
        if (folder / WEIGHTS_NAME).exists() or (folder / CONFIG_NAME).exists():
            try:
                gptfast.load(folder)
            except gptfast.CheckpointError as error:
                return str(error)
    return None


def result_of(path: Path) -> dict[str, Any]:
    """Returns weights and history of a run that has ended, without what depends on time."""
    state = torch.load(path / STATE_NAME, weights_only=True)
    model, _ = gptfast.load(path)
    best, _ = gptfast.load(path / BEST_NAME)
    rows = [
        {name: x for name, x in row.items() if not any(each in name for each in TIMES)}
        for row in state["state"]["history"]
    ]
    return {"rows": rows, "weights": model.state_dict(), "best": best.state_dict()}


def difference(got: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Returns where two results differ; None if no bit does."""
    if got["rows"] != expected["rows"]:
        return f"history: {got['rows']} instead of {expected['rows']}"
    for kind in ("weights", "best"):
        for name, weight in expected[kind].items():
            if not torch.equal(got[kind][name], weight):
                return f"{kind}: {name} differs"
    return None


def kill_runs(kills: int, seed: int, folder: Path) -> Outcome:
    """Kills so many processes that train, and returns what happened.

    Args:
        kills: How many.
        seed: Of the random moments. (The run at such a moment depends on the machine.)
        folder: An empty one for the runs.
    """
    moments, outcome, code = random.Random(seed), Outcome(), 0
    _, whole = worked(folder / "undisturbed")
    expected = result_of(folder / "undisturbed")
    while outcome.kills < kills or code == KILLED:
        path = folder / str(outcome.ended)
        # Most runs are killed several times; the last one may end.
        seconds = moments.uniform(0, whole / 2) if outcome.kills < kills else None
        code, _ = worked(path, seconds)
        found = unreadable(path)
        if code == KILLED:
            outcome.kills += 1
            outcome.before_a_save += not (path / STATE_NAME).is_file()
        else:
            outcome.ended += 1
            if found is None:
                found = f"exit code {code}" if code else difference(result_of(path), expected)
        if found is not None:
            outcome.wrong.append(f"{path.name}, after {outcome.kills} kills: {found}")
    return outcome


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 if a run was unreadable or came to other bits."""
    kills, seed = (int(each) for each in [*arguments, *("100", "0")[len(arguments) :]])
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_runs(kills, seed, Path(folder))
    for sentence in outcome.wrong:
        print(f"FAILED: {sentence}")
    print(
        f"{outcome.kills} kills, {outcome.before_a_save} of them before the first save;"
        f" {outcome.ended} runs ended, {len(outcome.wrong)} failures"
    )
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
