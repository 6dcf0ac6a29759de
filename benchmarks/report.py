"""Writes what the documents say of speed from `results/*.json`.

`python benchmarks/report.py` puts all tables into docs/benchmarks.md and a short one into
README.md, each between two markers, and draws docs/speed.svg. `--check` writes nothing and says
whether the three are what the results give.
"""

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any

from gptfast.pictures import COLOURS, GREY

FOLDER = Path(__file__).resolve().parent
RESULTS, ROOT = FOLDER / "results", FOLDER.parent
README, PAGE, PICTURE = "README.md", "docs/benchmarks.md", "docs/speed.svg"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SCRIPTS = {  # in the order of the tables
    "train": "A training step",
    "attention": "Attention (B x H x T x D)",
    "ffn": "Feed-forward block (rows x n_embd)",
    "cross_entropy": "Output projection and loss (rows x n_embd x vocab_size)",
    "generate": "Greedy generation, all texts of a batch",
    "gpt2": "Greedy generation by GPT-2 124M, prompts of different lengths",
}
GENERATING = ("generate", "gpt2")
SUMMARY = {  # the rows of README: script, name there, what it is
    ("train", "abc"): "training step, 2 layers of 128 on 64 x 16 characters",
    ("train", "shakespeare"): "training step, 2 layers of 128 on 64 x 64 characters",
    ("train", "gpt2"): "training step, GPT-2 124M",
    ("attention", "4x12x1024x64 forward+backward"): "attention 4x12x1024x64, with gradients",
    ("generate", "S, batch 1"): "generation, 2 layers of 128, one text",
    ("generate", "S, batch 64"): "generation, 2 layers of 128, 64 texts",
    ("generate", "S, batch 64, past the window"): "generation past the window, 64 texts",
    ("gpt2", "L, batch 1"): "generation, GPT-2 124M, one text",
    ("gpt2", "L, batch 64"): "generation, GPT-2 124M, 64 texts",
    ("gpt2", "L, prompt of 900 tokens"): "a prompt of 900 tokens, GPT-2 124M",
}
LOSS_CURVES, TIME_TO_LOSS = "loss_curves", "time_to_loss"
NOTHING = "No results have been committed yet."


class ReportError(Exception):
    """Results or documents that no tables can be made of."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results that there are. Raises ReportError where one cannot be reported."""
    found = []
    for script in (*SCRIPTS, LOSS_CURVES, TIME_TO_LOSS):
        path = folder / f"{script}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("failed"):
            raise ReportError(f"{path}: row {result['failed'][0]['name']!r} failed: run it again")
        found.append(result)
    return found


def report(results: list[dict[str, Any]]) -> str:
    """All tables, each below what it was measured on where that is new."""
    lines: list[str] = []
    before = ""
    for result in results:
        card = describe(result["card"])
        if card != before:
            lines += [card, ""]
            before = card
        if result["script"] == LOSS_CURVES:
            lines += loss_lines(result)
            continue
        if result["script"] == TIME_TO_LOSS:
            lines += time_lines(result)
            continue
        lines += [f"**{SCRIPTS[result['script']]}**", "", *table(result), "", *notes(result)]
        if any(row.get("memory_mib") for row in result["rows"]):
            lines += ["**Peak memory of a step, MiB**", "", *memory_table(result), ""]
    return "\n".join(lines).strip() or NOTHING


def describe(card: dict[str, Any]) -> str:
    """What a result was measured on, in a sentence."""
    missing = [level for level, reason in card["levels"].items() if reason != "available"]
    without = f" (no {', '.join(missing)})" if missing else ""
    return (
        f"{card['cpu']}, {card['threads']} threads, instruction set {card['isa']}{without}; "
        f"torch {card['torch']}, gptfast {card['gptfast']}, Python {card['python']}, "
        f"{card['date']}."
    )


def table(result: dict[str, Any]) -> list[str]:
    """A line per row; for each dtype gptfast's speed, and how many times faster it is than whom."""
    rows = by_name(result)
    generates = result["script"] in GENERATING
    measure, best = ("tokens/s", "x best other") if generates else ("ms", "x best torch")
    dtypes = list(result["peak"])
    course = any(name.startswith("course") for row in result["rows"] for name in row["ratio"])
    titles = [""]
    for dtype in dtypes:
        titles += [f"{dtype}, {measure}", *(["x course fp32"] if course else []), best]
        titles += ["of peak"]
    lines = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    for name, found in rows.items():
        cells = [name]
        for dtype in dtypes:
            cells += _cells(found.get(dtype), course)
        lines.append(_line(cells))
    return lines


def notes(result: dict[str, Any]) -> list[str]:
    """Which contenders do not run or are wrong, and what could not be measured."""
    noted = [row for row in result["rows"] if row["notes"]]
    lines = [
        f"- {row['name']}, {row['dtype']}: "
        + "; ".join(f"{name}: {note}" for name, note in row["notes"].items())
        for row in noted
    ]
    return [*lines, ""] if lines else []


def loss_lines(result: dict[str, Any]) -> list[str]:
    """Where the runs in float32 and bfloat16 end."""
    seeds = list(dict.fromkeys(run["seed"] for run in result["runs"]))
    steps = result["runs"][0]["curve"][-1][0]
    lines = [
        f"**Held-out loss on Shakespeare after {steps} steps, nats**",
        "",
        _line(["", *(f"seed {seed}" for seed in seeds)]),
        _line(["---", *["---:"] * len(seeds)]),
    ]
    for precision, losses in result["last"].items():
        lines.append(_line([f"trained in {precision}", *(f"{loss:.4f}" for loss in losses)]))
    for dtype, losses in result["engine"].items():
        if dtype in result["lost"]:
            name = f"... in fp32, {dtype} weights ({result['lost'][dtype]:+.2%})"
            lines.append(_line([name, *(f"{loss:.4f}" for loss in losses)]))
    return [*lines, ""]


def time_lines(result: dict[str, Any]) -> list[str]:
    """How long runs take: nanoGPT's for a CPU, and the course's three epochs."""
    lines = [
        f"**`shakespeare-cpu`, {result['runs'][0]['steps']:,} steps**",
        "",
        _line(["", "ms per step", "seconds", "held-out loss"]),
        _line(["---", *["---:"] * 3]),
    ]
    for run in result["runs"]:
        numbers = f"{run['ms']:.2f}", f"{run['seconds']:.1f}", f"{run['loss']:.4f}"
        lines.append(_line([f"{run['name']}, {run['dtype']}", *numbers]))
    lines += ["", f"**Three epochs of `shakespeare`, {result['epochs'][0]['steps']:,} steps**", ""]
    lines += [_line(["", "gptfast, s", "course fp32, s", "x course fp32"])]
    lines += [_line(["---", *["---:"] * 3])]
    for row in result["epochs"]:
        seconds = [f"{each:,.0f}" for each in row["seconds"].values()]
        lines.append(_line([row["dtype"], *seconds, f"{row['ratio']:.2f}"]))
    return [*lines, ""]


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows by name, then by dtype."""
    rows: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        rows.setdefault(row["name"], {})[row["dtype"]] = row
    return rows


def _cells(row: dict[str, Any] | None, course: bool) -> list[str]:
    if row is None:
        return ["-"] * (4 if course else 3)
    against = [ratio for name, ratio in row["ratio"].items() if name.startswith("course")]
    course_cell = [f"{against[0]:.2f}" if against else "-"]
    best = f"{row['ratio'][row['best']]:.2f} ({row['best']})" if row["best"] else "-"
    return [
        _number(_speed(row)[0]),
        *(course_cell if course else []),
        best,
        f"{row['of_peak']:.0%}",
    ]


def memory_table(result: dict[str, Any]) -> list[str]:
    """A line per row and dtype, a column per contender."""
    rows = [row for row in result["rows"] if row.get("memory_mib")]
    names = list(dict.fromkeys(name for row in rows for name in row["memory_mib"]))
    lines = [_line(["", *names]), _line(["---", *["---:"] * len(names)])]
    for row in rows:
        found = row["memory_mib"]
        cells = [f"{found[name]:.0f}" if name in found else "-" for name in names]
        lines.append(_line([f"{row['name']}, {row['dtype']}", *cells]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of README that have results: by dtype the speed, and by how much and whom it beats.

    Returns:
        Per row `text`, and `speed` and `best`, which map a dtype to (milliseconds or tokens per
        second, unit) and to (ratio, name of the fastest contender).
    """
    scripts = {result["script"]: by_name(result) for result in results if "rows" in result}
    found = []
    for (script, name), text in SUMMARY.items():
        speed, best = {}, {}
        for row in scripts.get(script, {}).get(name, {}).values():
            speed[row["dtype"]] = _speed(row)
            if row["best"]:
                best[row["dtype"]] = (row["ratio"][row["best"]], row["best"])
        if speed:
            found.append({"text": text, "speed": speed, "best": best})
    return found


def summary_table(rows: list[dict[str, Any]]) -> list[str]:
    """README's table: a line per row, two columns per dtype."""
    dtypes = list(dict.fromkeys(dtype for row in rows for dtype in row["speed"]))
    titles = ["", *(title for dtype in dtypes for title in (dtype, "x fastest other"))]
    lines = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    for row in rows:
        cells = [row["text"]]
        for dtype in dtypes:
            value, unit = row["speed"].get(dtype, (0.0, ""))
            ratio, name = row["best"].get(dtype, (0.0, ""))
            cells += [f"{_number(value)} {unit}" if unit else "-"]
            cells += [f"{ratio:.2f} ({name})" if name else "-"]
        lines.append(_line(cells))
    return lines


def draw(path: Path, rows: list[dict[str, Any]], card: str) -> None:
    """Draws how many times faster gptfast is than the fastest other contender of each row."""
    import matplotlib
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(dtype for row in rows for dtype in row["best"]))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptfast"}):
        figure = Figure(figsize=(8.5, 1.3 + 0.5 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for i, dtype in enumerate(dtypes):
            places = [y + (i - (len(dtypes) - 1) / 2) * 0.36 for y in range(len(rows))]
            ratios = [row["best"].get(dtype, (0.0, ""))[0] for row in rows]
            bars = axes.barh(places, ratios, height=0.33, color=COLOURS[i], label=dtype)
            names = [row["best"].get(dtype, (0.0, "-"))[1] for row in rows]
            labels = [f"{ratio:.1f} x {name}" for ratio, name in zip(ratios, names, strict=True)]
            axes.bar_label(bars, labels, padding=4, fontsize=8, color=GREY)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["text"] for row in rows], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.set_xlabel("times as fast as the fastest other")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", frameon=False)
        figure.suptitle(card, x=0.01, ha="left", fontsize=8)
        figure.savefig(path, metadata={"Date": None, "Description": _description(rows)})


def drawn(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether `path` is a picture of these rows; it names them in its description."""
    return path.exists() and html.escape(_description(rows), quote=False) in path.read_text()


def _description(rows: list[dict[str, Any]]) -> str:
    return json.dumps([[row["text"], row["best"]] for row in rows])


def _speed(row: dict[str, Any]) -> tuple[float, str]:
    tokens = row.get("details", {}).get("tokens/s")
    return (row["ms"]["gptfast"], "ms") if tokens is None else (tokens, "tokens/s")


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def insert(name: str, document: str, tables: str) -> str:
    """The document with these tables between the markers. Raises ReportError without markers."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{name} needs the lines {BEGIN} and {END}, in this order")
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where --check finds a difference, 2 where no tables can be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where a document differs"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the folder of the JSON files"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help=f"the folder of {README}, {PAGE} and {PICTURE}"
    )
    options = parser.parse_args(argv)
    try:
        results = read_results(options.results)
        rows = summary(results)
        machine = describe(results[0]["card"]) if results else ""
        tables = {README: "\n".join([machine, "", *summary_table(rows)]) if rows else NOTHING}
        tables[PAGE] = report(results)
        old = {name: (options.root / name).read_text(encoding="utf-8") for name in tables}
        new = {name: insert(name, old[name], tables[name]) for name in tables}
    except (ReportError, OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    picture = options.root / PICTURE
    if options.check:
        wrong = [name for name in tables if new[name] != old[name]]
        wrong += [] if drawn(picture, rows) or not rows else [PICTURE]
        if wrong:
            names = " and ".join(wrong)
            print(f"report: not what the results give: {names}; run report.py", file=sys.stderr)
        return int(bool(wrong))
    for name, text in new.items():
        (options.root / name).write_text(text, encoding="utf-8")
    if rows:
        draw(picture, rows, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
