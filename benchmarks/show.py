"""The output of a benchmark: the machine's card, the table, the JSON, the plot.

A result is a dict: `script`, `card`, `peak` (by dtype: `gflops`, `by`, `size`), `rows` and `failed`
(`name`, `dtype`, `why`). Its rows have `name`, `dtype`, `rounds`, `gflop`, `ms` (medians by
contender), `ratio` (how many times faster gptfast is, by contender), `best` (the fastest other
contender in the row's dtype, None if there is none), `gflops`, `of_peak`, `notes`, and optionally
`memory_mib` and `details` (numbers by name).
"""

import datetime
import json
from pathlib import Path
from typing import Any

from common import OURS, Case, Row, Timing
from rich.console import Console
from rich.table import Table
from rich.text import Text

import gptfast
from gptfast.errors import ConfigError
from gptfast.pictures import COLOURS, GREY

WIDTH = 200  # columns, if the output is not a terminal


def card() -> dict[str, Any]:
    """Returns the machine, the build and the versions that the numbers belong to."""
    from gptfast.info import info  # here: gpu_check.py needs no command line

    facts = info()
    return {
        "cpu": facts["cpu"],
        "isa": facts["isa"]["chosen"],
        "levels": {name: reason or "available" for name, reason in facts["isa"]["levels"].items()},
        "threads": facts["threads"]["torch"],
        "torch": facts["torch"],
        "gptfast": gptfast.__version__,
        "csrc": facts["build"].get("csrc", "unknown")[:12],
        "python": facts["python"],
        "date": datetime.date.today().isoformat(),
        "warnings": facts["warnings"],
    }


def line(
    row: Row, case: Case, timing: Timing, peak_gflops: float, notes: dict[str, str]
) -> dict[str, Any]:
    """Returns the result's entry for a row."""
    ours = timing.seconds[OURS]
    others = {name: s for name, s in timing.seconds.items() if name != OURS}
    alike = {name: s for name, s in others.items() if name not in case.other_dtype}
    gflops = 1e-9 * case.flops / ours
    return {
        "name": row.name,
        "dtype": row.dtype,
        "rounds": timing.rounds,
        "gflop": 1e-9 * case.flops,
        "ms": {name: 1e3 * s for name, s in timing.seconds.items()},
        "ratio": {name: s / ours for name, s in others.items()},
        "best": min(alike, key=alike.__getitem__) if alike else None,
        "gflops": gflops,
        "of_peak": gflops / peak_gflops,
        "notes": notes,
    }


def print_result(result: dict[str, Any]) -> None:
    """Prints card, peaks, table and notes to the standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    _print_card(console, result)
    console.print(_table(result["rows"]))
    if any("memory_mib" in row for row in result["rows"]):
        console.print(_memory_table(result["rows"]))
    if any("details" in row for row in result["rows"]):
        console.print(_details_table(result["rows"]))
    for row in result["rows"]:
        for name, note in row["notes"].items():
            console.print(Text(f"{row['name']}, {row['dtype']}: {name}: {note}"), soft_wrap=True)
    for row in result["failed"]:
        text = f"{row['name']}, {row['dtype']}: FAILED, not timed: {row['why']}"
        console.print(Text(text, style="bold red"), soft_wrap=True)


def _print_card(console: Console, result: dict[str, Any]) -> None:
    card = result["card"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("processor", Text(card["cpu"]))
    table.add_row("instruction set", card["isa"])
    for level, reason in card["levels"].items():
        table.add_row(f"  {level}", Text(reason))
    table.add_row("threads", str(card["threads"]))
    table.add_row("versions", f"gptfast {card['gptfast']} (csrc {card['csrc']}), {_versions(card)}")
    table.add_row("date", card["date"])
    for dtype, peak in result["peak"].items():
        text = (
            f"{peak['gflops']:.0f} GFLOP/s, the fastest product found: {peak['by']} {peak['size']}"
        )
        table.add_row(f"peak {dtype}", text)
    console.print(table)
    for warning in card["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print("Medians in ms, contenders in turn; (x) is how many times faster gptfast is.\n")


def _versions(card: dict[str, Any]) -> str:
    return f"torch {card['torch']}, python {card['python']}"


def contenders(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the names of all contenders but gptfast, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["ratio"]))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("row", overflow="fold")
    table.add_column("dtype")
    names = contenders(rows)
    for title in ("rounds", OURS, "GFLOP/s", "of peak", *names):
        table.add_column(title, justify="right")
    for row in rows:
        cells = [row["name"], row["dtype"], str(row["rounds"]), f"{row['ms'][OURS]:.3f}"]
        cells += [f"{row['gflops']:.1f}", f"{row['of_peak']:.0%}"]
        for name in names:
            known = name in row["ratio"]
            cells.append(f"{row['ms'][name]:.3f} ({row['ratio'][name]:.2f}x)" if known else "-")
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    measured = [row for row in rows if "memory_mib" in row]
    table = Table(title="\npeak memory of a step, MiB", title_justify="left", box=None)
    table.add_column("row")
    table.add_column("dtype")
    names = [OURS, *contenders(measured)]
    for name in names:
        table.add_column(name, justify="right")
    for row in measured:
        found = row["memory_mib"]
        cells = [f"{found[name]:.0f}" if name in found else "-" for name in names]
        table.add_row(row["name"], row["dtype"], *cells)
    return table


def _details_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="\ngptfast", title_justify="left", box=None)
    table.add_column("row")
    table.add_column("dtype")
    names = list(dict.fromkeys(name for row in rows for name in row.get("details", {})))
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        found = row.get("details", {})
        cells = [f"{found[name]:,.4g}" if name in found else "-" for name in names]
        table.add_row(row["name"], row["dtype"], *cells)
    return table


def print_json(result: dict[str, Any]) -> None:
    """Prints the result on one line."""
    print(json.dumps(result), flush=True)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the result for people to read, and for `report.py`."""
    path.write_text(to_text(result), encoding="utf-8")


def to_text(result: dict[str, Any]) -> str:
    """Returns a result as JSON with a line per row, so that a diff shows which rows changed."""
    fields = [f"  {json.dumps(name)}: {_field(value)}" for name, value in result.items()]
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _field(value: Any) -> str:
    if not (isinstance(value, list) and value and all(isinstance(row, dict) for row in value)):
        return json.dumps(value, indent=2).replace("\n", "\n  ")
    rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
    return f"[\n{rows}\n  ]"


def need_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'gptfast-kernels[plot]'") from None


def plot(path: Path, result: dict[str, Any]) -> None:
    """Plots how many times faster gptfast is than each contender, one group of bars per row."""
    from matplotlib.figure import Figure

    rows, names = result["rows"], contenders(result["rows"])
    bars = [(row, name) for row in rows for name in names if name in row["ratio"]]
    height = 1.6 + 0.28 * len(bars) + 0.22 * len(rows)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0.0, []
    for row in rows:
        found = [name for name in names if name in row["ratio"]]
        ticks.append((y + (len(found) - 1) / 2, f"{row['name']}, {row['dtype']}"))
        for name in found:
            ratio = row["ratio"][name]
            axes.barh(y, ratio, height=0.85, color=COLOURS[names.index(name) % len(COLOURS)])
            axes.annotate(
                f"{ratio:.2f}",
                (ratio, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=GREY,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # hides the line at 1
            )
            y += 1
        y += 0.8
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("times faster than ... (1: equally fast)")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        axes.barh(0, 0, color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False)
    card = result["card"]
    title = f"{card['cpu']}, {card['isa']}, {card['threads']} threads, torch {card['torch']}"
    axes.set_title(title, loc="left", fontsize=9)
    figure.savefig(path, dpi=150)
