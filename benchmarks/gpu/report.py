"""The results of gpu_check.py: a file that is always whole, and a line for each row."""

from pathlib import Path
from typing import Any

from show import to_text

MARK = "ROW "  # begins a line of a section's standard output that has a result
CEILINGS = "ceilings"  # the section that measures what the GPU reaches


class Report:
    """The results so far, in a file that is always whole."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out = out
        self.found: dict[str, Any] = {**facts, "seconds": {}, "rows": [], "failed": []}

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Adds a row, prints it and writes the file."""
        row = {"section": section, **row}
        self.found["rows"].append(row)
        if row.get("failed"):
            self.found["failed"].append(f"{section}: {row['name']}: {row['failed']}")
        print(sentence(row, self.ceiling()), flush=True)
        self.write()

    def fail(self, section: str, why: str) -> None:
        """Notes that a section did not end well."""
        self.found["failed"].append(f"{section}: {why}")
        print(f"{section}: {why}", flush=True)
        self.write()

    def ceiling(self) -> dict[str, float]:
        """Returns the measured `gb_s` and `tflops` of this GPU; {} before they are known."""
        return next((row for row in self.found["rows"] if row["section"] == CEILINGS), {})

    def write(self) -> None:
        """Replaces the file, in one step, so that a run cut short leaves one that can be read."""
        temporary = self.out.with_name(f"{self.out.name}.partial")
        temporary.write_text(to_text(self.found), encoding="utf-8")
        temporary.replace(self.out)


def sentence(row: dict[str, Any], ceiling: dict[str, float]) -> str:
    """Returns a row in one line."""
    text = f"{row['section']:<10} {row['name']}"
    if "dtype" in row:
        text += f", {row['dtype']}"
    if row.get("failed"):
        text += f": FAILED: {row['failed']}"
    if "ms" in row:
        ours, best = row["ms"]["gptfast"], row["best"]
        text += f": {ours:.4g} ms"
        text += "".join(f", {value:,.4g} {name}" for name, value in row.get("details", {}).items())
        if "tflops" in row:
            text += f", {row['tflops']:.0f} TFLOP/s"
            if ceiling:
                text += f" ({row['tflops'] / ceiling['tflops']:.0%} of the product)"
        if best:
            text += f", {row['ratio']:.2f} x {best} ({row['ms'][best]:.4g} ms)"
        if "peak_mib" in row:
            text += f", {row['peak_mib']['gptfast']:.0f} MiB"
        if row["errors"]:
            text += f", error {row['errors']['gptfast']:.1e}"
        for name, note in row["notes"].items():
            text += f"; {name}: {note}"
        return text
    if "kernels" in row:
        lines = [f"{text}: {row['total_ms']:.3f} ms in {row['launches']:.0f} launches"]
        for each in row["kernels"]:
            lines.append(f"    {each['ms']:9.4f} ms {each['calls']:6.1f} x {each['name'][:80]}")
        return "\n".join(lines)
    if row.get("failed"):
        return text
    numbers = row.get("counts", row)
    numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
    return f"{text}: " + ", ".join(f"{value:.4g} {name}" for name, value in numbers.items())
