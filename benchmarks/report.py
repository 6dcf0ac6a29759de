"""Writes the README's tables of speed from `results/*.json`, between its two markers.

`python benchmarks/report.py` writes them, `--check` only says whether README has them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS, README = FOLDER / "results", FOLDER.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SCRIPTS = {  # in the README's order
    "train": "A training step",
    "attention": "Attention (B x H x T x D)",
    "ffn": "Feed-forward block (rows x n_embd)",
    "cross_entropy": "Output projection and loss (rows x n_embd x vocab_size)",
    "generate": "Greedy generation, all texts of a batch",
}
LOSS_CURVES = "loss_curves"
NOTHING = "No results have been committed yet."


class ReportError(Exception):
    """Results or a README that no tables can be made of."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results that there are. Raises ReportError where one cannot be reported."""
    found = []
    for script in (*SCRIPTS, LOSS_CURVES):
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
    generates = result["script"] == "generate"
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
    """Which contenders do not run, and what could not be measured."""
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
    speed = row.get("details", {}).get("tokens/s")
    value = row["ms"]["gptfast"] if speed is None else speed
    shown = f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return [shown, *(course_cell if course else []), best, f"{row['of_peak']:.0%}"]


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


def insert(readme: str, tables: str) -> str:
    """The README with these tables between the markers. Raises ReportError without markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"README needs the lines {BEGIN} and {END}, in this order")
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where --check finds a difference, 2 where no tables can be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where README differs"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the folder of the JSON files"
    )
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = insert(old, report(read_results(options.results)))
    except (ReportError, OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != old:
            print("report: README differs from the results: run report.py", file=sys.stderr)
        return int(new != old)
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
