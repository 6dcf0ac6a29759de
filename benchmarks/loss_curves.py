"""Compares the loss of training in bfloat16 and in float32, on the Shakespeare preset.

Trains with several seeds in each precision; a seed gives both the same initial weights, windows and
dropout masks. The difference of the mean held-out losses must not exceed the spread of float32 over
the seeds. The engine's bf16 and int8 weights must not increase the mean loss of the float32 models
by more than half a percent. The last line is JSON. Exit code 1: a limit is exceeded; 2: invalid
options.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import command
import show
from rich.console import Console
from rich.table import Table

import gptfast
from gptfast import threads, training
from gptfast.errors import GptfastError
from gptfast.pictures import COLOURS

PRECISIONS = ("fp32", "bf16")
WEIGHTS = ("fp32", "bf16", "int8")  # the engine's dtypes
MAX_LOSS_INCREASE = 0.005  # largest relative increase of the loss


def main(argv: list[str] | None = None) -> int:
    """Trains, prints the curves, and compares the final losses; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="the text; default: Shakespeare, downloaded")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves")
    options = parser.parse_args(argv)
    threads.use_usable_threads()
    try:
        if len(options.seeds) < 2:
            raise gptfast.ConfigError(f"--seeds needs two at least, got {len(options.seeds)}")
        command.check_outputs(options.out, options.plot)
        runs = [
            {"precision": precision, "seed": seed, **train(precision, seed, options)}
            for seed in options.seeds
            for precision in PRECISIONS
        ]
    except (GptfastError, OSError) as error:
        print(f"loss_curves: {command.sentence(error)}", file=sys.stderr)
        return command.EXIT_BAD_INPUT
    result = {"script": "loss_curves", "card": show.card(), "runs": runs} | compare(runs)
    print_result(result)
    if options.out:
        show.write_json(options.out, result)
    if options.plot:
        plot(options.plot, result)
    show.print_json(result)
    return 0 if result["within"] else command.EXIT_FAILED


def train(precision: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model; returns its held-out losses in nats, for fp32 the engine's as well."""
    print(f"{precision}, seed {seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        done = gptfast.train(
            "shakespeare",
            folder,
            data=options.data,
            steps=options.steps,
            eval_every=max(1, options.steps // 10),
            precision=precision,
            seed=seed,
            overwrite=True,
        )
        text = training.held_out(folder).tolist()
    found: dict[str, Any] = {"curve": [(row["step"], row["val_loss"]) for row in done.history]}
    if precision == "fp32":
        found["engine"] = {dtype: engine_loss(done.model, text, dtype) for dtype in WEIGHTS}
    return found


def engine_loss(model: gptfast.GPT, text: list[int], dtype: str) -> float:
    """Returns the mean loss of a text in nats per token, in disjoint windows."""
    (scored,) = gptfast.score(model, [text], stride=model.config.block_size, dtype=dtype)
    return -scored.logprob / len(scored.logprobs)


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares the final losses: by precision and seed, difference of the means, spread of fp32.

    `engine` has the engine's losses by dtype and seed; `lost` has the relative increase of their
    mean over fp32.
    """
    last = {
        precision: [run["curve"][-1][1] for run in runs if run["precision"] == precision]
        for precision in PRECISIONS
    }
    mean = {precision: sum(losses) / len(losses) for precision, losses in last.items()}
    difference = mean["bf16"] - mean["fp32"]
    spread = max(last["fp32"]) - min(last["fp32"])
    engine = {
        dtype: [run["engine"][dtype] for run in runs if run["precision"] == "fp32"]
        for dtype in WEIGHTS
    }
    lost = {dtype: sum(engine[dtype]) / sum(engine["fp32"]) - 1 for dtype in WEIGHTS[1:]}
    within = abs(difference) <= spread and max(lost.values()) <= MAX_LOSS_INCREASE
    return {
        "last": last,
        "difference": difference,
        "spread": spread,
        "engine": engine,
        "lost": lost,
        "within": within,
    }


def print_result(result: dict[str, Any]) -> None:
    """Prints the curves as a table, and the comparison."""
    runs = result["runs"]
    table = Table(box=None)
    table.add_column("step", justify="right")
    for run in runs:
        table.add_column(f"{run['precision']}, seed {run['seed']}", justify="right")
    for points in zip(*(run["curve"] for run in runs), strict=True):
        table.add_row(str(points[0][0]), *(f"{loss:.4f}" for _, loss in points))
    console = Console(highlight=False, width=show.WIDTH)
    console.print(table)
    console.print(
        f"\nbf16 ends {result['difference']:+.4f} from fp32 in the mean; another seed changes fp32"
        f" by up to {result['spread']:.4f}"
    )
    for dtype, lost in result["lost"].items():
        console.print(f"the engine's {dtype} weights change fp32's loss by {lost:+.3%}")


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draws all curves, one colour per precision."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for run in result["runs"]:
        i = PRECISIONS.index(run["precision"])
        first = run["seed"] == result["runs"][0]["seed"]
        axes.plot(
            *zip(*run["curve"], strict=True),
            color=COLOURS[i],
            linestyle=("-", "--")[i],
            label=run["precision"] if first else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per character")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
