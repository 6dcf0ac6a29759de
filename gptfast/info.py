"""Facts about the installation and the machine: `gptfast info`."""

import hashlib
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from gptfast import threads
from gptfast.console import Console
from gptfast.ops import select
from gptfast.training.capturable import unsupported
from gptfast.training.watching.machine import cpu_name, version

Version = tuple[int, int]

_PACKAGE = Path(__file__).resolve().parent


def info() -> dict[str, Any]:
    """Collects the facts about the installation and the machine.

    Returns:
        `gptfast`, `torch`, `python`, `cpu`, `gpu`: names and versions. `torch_range`: the oldest
        and the newest torch that gptfast is tested with, None if unknown. `fused`: None if the
        compiled kernels are available, else the reason. `training_graph`: None if a training step
        can be a CUDA graph here, else the reason. `isa`: the `chosen` level (None if there is
        none), and `levels`, which maps each level to None or the reason why it cannot run.
        `threads`: the fields of `ThreadLimits` and `usable`. `build`: the record of setup.py.
        `openmp`: the OpenMP libraries in the process. `warnings`: problems, one sentence each.
    """
    build = build_info()
    warnings = []
    tested = tested_torch()
    problem = tested and _outside(tested)
    if problem:
        warnings.append(problem)
    if stale_build():
        warnings.append("csrc has changed since the compiled part was built: run `make build`")
    isa, problem = _isa(build)
    if problem is not None:
        warnings.append(problem)
    limits = threads.limits()
    if limits.usable < limits.torch:
        warnings.append(f"torch uses {limits.torch} threads where {limits.usable} can run at once")
    openmp = openmp_runtimes()
    if len(openmp) > 1:
        warnings.append("more than one OpenMP library is loaded: each keeps threads of its own")
    if torch.cuda.is_available() and select.triton_error() is None:
        from gptfast.ops.triton.launch import slow_launches

        reason = slow_launches()
        if reason is not None:
            warnings.append(f"launching a kernel takes 50 us more than it need: {reason}")
    return {
        "gptfast": version(),
        "torch": torch.__version__,
        "torch_range": tested and tuple(map(_dotted, tested)),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "fused": _fused_reason(build),
        "training_graph": unsupported("cuda" if torch.cuda.is_available() else "cpu"),
        "isa": isa,
        "threads": {
            "usable": limits.usable,
            "torch": limits.torch,
            "affinity": limits.affinity,
            "quota": limits.quota,
            "processes": limits.processes,
        },
        "build": build,
        "openmp": openmp,
        "warnings": warnings,
    }


def build_info() -> dict[str, Any]:
    """Returns the record that setup.py wrote when it built this package; {} without a record."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def stale_build() -> bool:
    """Whether the C++ sources in the tree differ from those that were compiled."""
    sources = _PACKAGE.parent / "csrc"
    recorded = build_info()
    if not sources.is_dir() or not recorded or recorded["reason"] is not None:
        return False
    parts = [path.read_bytes() for path in sorted(sources.rglob("*.[chi]*"))]
    return hashlib.sha256(b"".join(parts)).hexdigest() != recorded["csrc"]


def tested_torch() -> tuple[Version, Version] | None:
    """Returns `torch_range` of the installed package; None if it is not installed."""
    try:
        requirements = importlib.metadata.requires("gptfast-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((torch_range(line) for line in requirements if re.match(r"torch\b", line)), None)


def torch_range(requirement: str) -> tuple[Version, Version]:
    """Returns the oldest and newest torch that "torch>=2.10,<2.14" allows: (2, 10), (2, 13)."""
    pattern = r"torch[\d.,<>=]*?{}(\d+)\.(\d+)"
    oldest, end = (re.findall(pattern.format(sign), requirement)[0] for sign in (">=", "<"))
    return (int(oldest[0]), int(oldest[1])), (int(end[0]), int(end[1]) - 1)


def openmp_runtimes() -> list[str]:
    """Returns the paths of the OpenMP libraries loaded into this process (on Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*/lib(?:g|i)?omp\d?\b[^/\s]*\.so\S*", maps)))


def print_info() -> None:
    """Prints the facts of `info` as a table, followed by the warnings."""
    facts = info()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    for warning in facts["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    build, isa, limits = facts["build"], facts["isa"], facts["threads"]
    quota = "none" if limits["quota"] is None else f"{limits['quota']:g}"
    tested = " (tested: {} to {})".format(*facts["torch_range"]) if facts["torch_range"] else ""
    rows = [
        ("gptfast", facts["gptfast"]),
        ("torch", facts["torch"] + tested),
        ("python", facts["python"]),
        ("processor", facts["cpu"]),
        ("GPU", facts["gpu"] or "none"),
        ("fused kernels", facts["fused"] or "available"),
        ("training graph", facts["training_graph"] or "with --device cuda"),
        ("instruction set", isa["chosen"] or "none chosen"),
    ]
    rows += [(f"  {level}", reason or "available") for level, reason in isa["levels"].items()]
    rows += [
        ("threads", str(limits["usable"])),
        ("  torch's pool", str(limits["torch"])),
        ("  affinity mask", str(limits["affinity"])),
        ("  cgroup quota", quota),
        ("OpenMP", "\n".join(facts["openmp"]) or "none loaded"),
    ]
    if build and build["reason"] is None:
        rows.append(("built with", f"torch {build['torch']}, {build['compiler']}"))
        rows.append(
            ("built from", f"commit {build['git'] or 'unknown'}, csrc {build['csrc'][:12]}")
        )
    return rows


def _dotted(version: Version) -> str:
    return "{}.{}".format(*version)


def _outside(tested: tuple[Version, Version]) -> str | None:
    """Returns a warning if torch is outside the tested range, else None."""
    major, minor = torch.__version__.split(".")[:2]
    oldest, newest = map(_dotted, tested)
    if (int(major), int(minor)) < tested[0]:
        return f"torch {torch.__version__} is too old: gptfast needs {oldest} or a newer one"
    if (int(major), int(minor)) > tested[1]:
        return (
            f"torch {torch.__version__} is newer than those that gptfast is tested with "
            f"({oldest} to {newest}); the kernels use its stable interface alone"
        )
    return None


def _fused_reason(build: dict[str, Any]) -> str | None:
    if select.extension() is not None:
        return None
    if not build:
        return "not built: neither `pip install` nor `make build` has been run here"
    return f"not available: {build['reason'] or select.extension_error}"


def _isa(build: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Returns the `isa` entry of `info`, and the error of GPTFAST_CPU_ISA or None."""
    extension = select.extension()
    if extension is None:
        return {"chosen": None, "levels": {}}, None
    levels = extension.isa_levels()
    for level, reason in build.get("isa", {}).items():
        if reason is not None:
            levels[level] = f"left out of this build ({reason})"
    try:
        return {"chosen": extension.isa_current(), "levels": levels}, None
    except ValueError as error:
        return {"chosen": None, "levels": levels}, str(error)
