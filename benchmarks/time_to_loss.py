"""Times whole trainings on Shakespeare: how long until a model is as good as others' is.

The preset `shakespeare-cpu` (nanoGPT's run for a CPU) is trained by gptfast and by the same model
in plain torch, from the same initial weights and on the same windows, so to the same held-out loss;
evaluations are not counted. The three epochs of the preset `shakespeare` are timed by a sample of
their steps, beside the course's model. The last line is JSON. Exit code 1: torch's losses are not
gptfast's; 2: invalid options.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_train
import command
import peers
import show
import torch
from common import DTYPES, OURS, compiled, measure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gptfast
from gptfast import GPT, CharTokenizer, data, threads, training
from gptfast.errors import GptfastError
from gptfast.presets import Preset, preset
from gptfast.testing import Op
from gptfast.training.optimizer import weight_groups
from gptfast.training.schedule import learning_rate

FAR = 0.01  # nats; from our loss at any evaluation, where torch trains something else
COMPILED = bench_train.COMPILED
Curve = list[tuple[int, float, float]]  # step, seconds of training until it, held-out loss


@dataclass(frozen=True)
class Task:
    """What all train: a model, initial weights, a text, a schedule."""

    recipe: Preset
    text: str
    seed: int = 1

    def parts(self) -> tuple[Tensor, Tensor, CharTokenizer]:
        """The training and the held-out tokens, (N,) and (M,) int64, and their tokenizer."""
        tokenizer = CharTokenizer.from_text(self.text)
        train_ids, val_ids = training.split(tokenizer.encode_tensor(self.text), self.recipe.train)
        assert val_ids is not None
        return train_ids, val_ids, tokenizer


def main(argv: list[str] | None = None) -> int:
    """Trains, times and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="the text; default: Shakespeare, downloaded")
    parser.add_argument("--steps", type=int, help="default: the preset's 2000")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, metavar="N", help="of torch and gptfast")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the sample of steps")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    try:
        if options.threads is not None:
            torch.set_num_threads(threads.check_threads("--threads", options.threads))
        else:
            threads.use_usable_threads()
        command.check_outputs(options.out, None)
        changes = {"eval_every": options.every}
        if options.steps is not None:
            changes["steps"] = options.steps
        recipe = preset("shakespeare-cpu").override(changes)
        text = data.shakespeare() if options.data is None else data.read_text(options.data)
        runs = [
            run
            for dtype in options.dtype
            for run in time_to_loss(Task(recipe, text), dtype, not options.no_compile)
        ]
        epochs = [three_epochs(text, dtype, options.seconds) for dtype in options.dtype]
    except (GptfastError, OSError) as error:
        print(f"time_to_loss: {command.sentence(error)}", file=sys.stderr)
        return command.EXIT_BAD_INPUT
    failed = failures(runs)
    result: dict[str, Any] = {"script": "time_to_loss", "card": show.card()}
    result |= {"runs": runs, "epochs": epochs, "failed": failed}
    print_result(result)
    if options.out:
        show.write_json(options.out, result)
    show.print_json(result)
    return command.EXIT_FAILED if failed else 0


def time_to_loss(task: Task, dtype: str, compiles: bool) -> list[dict[str, Any]]:
    """Trains with each contender; returns what `summary` says of each."""
    contenders: dict[str, Callable[[], Curve]] = {
        OURS: lambda: our_curve(task, dtype),
        "SDPA": lambda: torch_curve(task, dtype, peers.loss),
    }
    if compiles:
        contenders[COMPILED] = lambda: torch_curve(task, dtype, compiled(peers.loss))
    found = []
    for name, train in contenders.items():
        print(f"{name}, {dtype}", file=sys.stderr)
        found.append(summary(name, dtype, train()))
    return found


def summary(name: str, dtype: str, curve: Curve) -> dict[str, Any]:
    """Returns `name`, `dtype`, `curve`; `steps`, `seconds` and `loss` at its end; `ms` a step."""
    steps, seconds, loss = curve[-1]
    found = {"name": name, "dtype": dtype, "ms": 1e3 * seconds / steps}
    return found | {"steps": steps, "seconds": seconds, "loss": loss, "curve": curve}


def our_curve(task: Task, dtype: str) -> Curve:
    """Trains by `gptfast.train`."""
    done = gptfast.train(
        task.recipe, text=task.text, precision=dtype, seed=task.seed, progress=False
    )
    return [(row["step"], row["seconds"], row["val_loss"]) for row in done.history]


def torch_curve(task: Task, dtype: str, loss_of: Op) -> Curve:
    """Trains the same model as a torch user does, after one untimed pass, which may compile.

    Args:
        task: What to train.
        dtype: "bf16" computes under autocast.
        loss_of: Computes the loss from model, inputs and targets.
    """
    train_ids, val_ids, tokenizer = task.parts()
    config, T = task.recipe.train, task.recipe.model.block_size
    ours = GPT(
        replace(task.recipe.model, vocab_size=tokenizer.vocab_size),
        generator=torch.Generator().manual_seed(task.seed),
    )
    model = peers.SdpaGPT(ours.config)
    model.load_state_dict(ours.state_dict())
    optimizer = adamw(model, task.recipe)
    generator = torch.Generator().manual_seed(task.seed)
    curve: Curve = []
    seconds, total = 0.0, config.steps or 0

    def backward(idx: Tensor, targets: Tensor) -> None:
        with bench_train.autocast(idx.device, dtype):
            loss = loss_of(model, idx, targets)
        loss.backward()

    backward(*data.random_windows(train_ids, T, config.batch_size, torch.Generator()))
    optimizer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    for step in range(total):
        backward(*data.random_windows(train_ids, T, config.batch_size, generator))
        nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % (config.eval_every or total) == 0 or step + 1 == total:
            seconds += time.perf_counter() - start
            ours.load_state_dict(model.state_dict())
            evaluation = training.evaluate(ours, val_ids, "bf16" if dtype == "bf16" else "fp32")
            curve.append((step + 1, seconds, evaluation.loss))
            start = time.perf_counter()
    return curve


def adamw(model: nn.Module, recipe: Preset) -> torch.optim.AdamW:
    """torch's fused AdamW, which decays matrices alone, as nanoGPT's does."""
    config = recipe.train
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "fused": True}
    groups = weight_groups(list(model.parameters()), config.decayed)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, **options)


def three_epochs(text: str, dtype: str, seconds: float) -> dict[str, Any]:
    """Times steps of `shakespeare` and of the course's model; returns the seconds of all epochs.

    The course computes in float32 in every row. Both are verified first, see `bench_train.verify`.
    """
    recipe = preset("shakespeare")
    train_ids, _, _ = Task(recipe, text).parts()
    batch = recipe.train.batch_size
    windows = data.EpochWindows(train_ids, recipe.model.block_size, batch)
    steps = len(windows) * (recipe.train.epochs or 0)
    (shape,) = (shape for shape in bench_train.SHAPES if shape.name == recipe.name)
    course = bench_train.course_name(dtype)
    wrong = bench_train.verify(shape, dtype)
    assert course not in wrong, f"{course} {wrong[course]}"
    contenders = bench_train.makers(shape, dtype)
    timing = measure({name: contenders[name]() for name in (OURS, course)}, seconds)
    whole = {name: steps * each for name, each in timing.seconds.items()}
    return {
        "dtype": dtype,
        "steps": steps,
        "rounds": timing.rounds,
        "seconds": whole,
        "ratio": whole[course] / whole[OURS],
    }


def failures(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What contradicts the comparison: other losses than gptfast's in the same dtype."""
    ours = {run["dtype"]: run["curve"] for run in runs if run["name"] == OURS}
    found = []
    for run in runs:
        for (step, _, loss), own in zip(run["curve"], ours[run["dtype"]], strict=True):
            if not abs(loss - own[2]) <= FAR:  # true of NaN too
                why = f"its loss at step {step} is {loss:.4f}, gptfast's {own[2]:.4f}"
                found.append({"name": run["name"], "dtype": run["dtype"], "why": why})
                break
    return found


def print_result(result: dict[str, Any]) -> None:
    """Prints both tables and what failed."""
    console = Console(highlight=False, width=show.WIDTH)
    table = Table(title="shakespeare-cpu", title_justify="left", box=None)
    for title in ("", "dtype", "ms per step", "steps", "seconds", "held-out loss"):
        table.add_column(title, justify="left" if title in ("", "dtype") else "right")
    for run in result["runs"]:
        numbers = f"{run['ms']:.2f}", str(run["steps"]), f"{run['seconds']:.1f}"
        table.add_row(run["name"], run["dtype"], *numbers, f"{run['loss']:.4f}")
    console.print(table)
    for row in result["epochs"]:
        seconds = ", ".join(f"{name} {each:,.0f} s" for name, each in row["seconds"].items())
        console.print(
            f"three epochs of shakespeare, {row['steps']:,} steps, {row['dtype']}: {seconds} "
            f"({row['ratio']:.2f} x)"
        )
    for row in result["failed"]:
        console.print(f"{row['name']}, {row['dtype']}: FAILED: {row['why']}")


if __name__ == "__main__":
    sys.exit(main())
