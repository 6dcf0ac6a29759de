"""Tests, verifies and times the GPU path against its peers, with one command, in four minutes.

It needs a GPU, torch and Triton, and no compiled extension. Kernels are compiled first, by many
processes; then every section runs in a process of its own, with a time limit, so that an error in
one does not hide the others. A section's process is started during the one before: imports take
seconds. Results are written as they come, and compared with the largest copy and product that this
GPU was seen to do. Exit code 1: something failed or was not finished; 2: invalid options, or no
GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, see `search_path`
from gpu.report import MARK, Report  # noqa: E402

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
WORKERS, MOST_TESTS = 12, 16  # processes that compile, and that test
FULL_FACTOR = 10  # by which --full lengthens the limits


@dataclass(frozen=True)
class Section:
    """A part of the check."""

    name: str
    seconds: float  # time limit
    rows: bool = True  # whether its module has rows to compile and to measure


# In this order: the tests compile many small kernels of their own, and get what time is left.
SECTIONS = (
    Section("train", 35),
    Section("generate", 30),
    Section("attention", 15),
    Section("loss", 10),
    Section("products", 15),
    Section("profile", 15, rows=False),
    Section("tests", 58, rows=False),
)
COMPILING, CEILINGS = Section("compiling", 45, rows=False), Section("ceilings", 8, rows=False)
SECONDS = 235  # of everything, without --full
IMPORTING = 30  # seconds that a section's process has before its limit begins


def started(command: list[str], errors: Any) -> "subprocess.Popen[str]":
    """Starts a process."""
    environment = {**os.environ, "PYTHONPATH": search_path(), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
    )  # fmt: skip


def lines_of(process: "subprocess.Popen[str]", seconds: float) -> Iterator[str | int | None]:
    """Yields the lines of a process as it writes them, at last its exit code.

    It may wait for a line from here. `seconds` later the process and what it has started are
    killed; then the last is None.
    """
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        kill(process)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("go\n")
            process.stdin.close()
        for line in process.stdout:
            yield line.rstrip("\n")
        code = process.wait()
        yield None if expired.is_set() else code
    finally:
        timer.cancel()
        kill(process)


def kill(process: "subprocess.Popen[str]") -> None:
    """Ends a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def search_path() -> str:
    """Returns PYTHONPATH for the processes: the package beside this script, scripts and tests."""
    own = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    return os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


class Waiting:
    """A section's process, which imports what it needs, and then waits for its turn."""

    def __init__(self, section: Section, options: argparse.Namespace) -> None:
        self.section = section
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--section", section.name]
        self.process = started([*command, *shared_options(options)], self.errors)

    def wait_for_imports(self) -> None:
        """Waits for the first line of the process, which is not a row."""
        timer = threading.Timer(IMPORTING, kill, [self.process])
        timer.start()
        assert self.process.stdout is not None
        self.process.stdout.readline()
        timer.cancel()


def run_section(waiting: Waiting, options: argparse.Namespace, report: Report) -> None:
    """Runs a section in a process of its own and reports its rows as they come."""
    section = waiting.section
    waiting.wait_for_imports()
    seconds, start = options.limit(section), time.monotonic()
    with waiting.errors as errors:
        code: str | int | None = None
        for code in lines_of(waiting.process, seconds):
            if isinstance(code, str) and code.startswith(MARK):
                report.add(section.name, json.loads(code.removeprefix(MARK)))
        errors.seek(0)
        said = errors.read().strip().splitlines()
    report.found["seconds"][section.name] = round(time.monotonic() - start, 1)
    if code is None:
        report.fail(section.name, f"not finished after {seconds:.0f} seconds")
    elif code:
        last = next((line for line in reversed(said) if line.strip()), "no message")
        report.fail(section.name, f"ended with exit code {code}: {last.strip()[:300]}")
    report.write()


def run_tests(options: argparse.Namespace, report: Report) -> None:
    """Runs the tests of the kernels on the GPU, in parallel where pytest-xdist is installed."""
    seconds, start = options.limit(SECTIONS[-1]), time.monotonic()
    code, outcomes, text = None, dict[str, str](), []
    process = started(pytest_command(options.full), subprocess.STDOUT)
    for line in lines_of(process, seconds):
        code = line
        if not isinstance(line, str):
            break
        text.append(line)
        found = re.search(r"(PASSED|FAILED|ERROR|SKIPPED)", line)
        name = re.search(r"tests/\S+::\S.*?(?= (?:PASSED|FAILED|ERROR|SKIPPED)|$)", line)
        if found and name and not line.startswith(("FAILED", "ERROR")):
            outcomes[name[0].strip()] = found[1]
    report.found["seconds"]["tests"] = round(time.monotonic() - start, 1)
    counts = {kind.lower(): sum(each == kind for each in outcomes.values())
              for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}  # fmt: skip
    failures = [line for line in text if line.startswith(("FAILED", "ERROR"))]
    failures = failures or [each for each, kind in outcomes.items() if kind in ("FAILED", "ERROR")]
    row: dict[str, Any] = {"name": "pytest -m cuda", "counts": counts, "failures": failures}
    if failures:
        row["failed"] = f"{len(failures)} tests, {counts['passed']} passed"
    report.add("tests", row)
    for each in failures:
        print(f"    {each[:240]}")
    if code is None:
        report.fail("tests", f"not finished after {seconds:.0f} seconds")
    elif code and not failures:
        report.fail("tests", f"pytest ended with {code}: {text[-1] if text else 'no message'}")
    elif not counts["passed"]:
        report.fail("tests", "no test passed")


def pytest_command(full: bool) -> list[str]:
    """Returns the command that tests the kernels on a GPU."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_triton*.py"))
    # Only these options, because those of pyproject.toml are for plugins that may be missing.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-o", "addopts=", *files]
    command += ["-p", "no:cacheprovider", "-m", "cuda" if full else "cuda and not full"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(MOST_TESTS, os.cpu_count() or 1))]
    return command


def compile_all(chosen: list[Section], options: argparse.Namespace, report: Report) -> None:
    """Fills Triton's cache on disk from several processes, each with a part of the rows."""
    names = [each.name for each in chosen if each.rows]
    if not names:
        return
    start = time.monotonic()
    workers = options.workers
    failed: list[str] = []

    def work(part: int, folder: str) -> None:
        command = [sys.executable, __file__, "--warm", f"{part}/{workers}/{folder}"]
        command += ["--only", *names, *shared_options(options)]
        process = started(command, subprocess.STDOUT)
        for line in lines_of(process, options.limit(COMPILING)):
            if isinstance(line, str) and "failed" in line:
                failed.append(line)
            elif line is None:  # the sections compile the rest
                print(f"compiling: part {part} of {workers} was not finished")

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=work, args=(i, folder)) for i in range(workers)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    report.found["seconds"][COMPILING.name] = round(time.monotonic() - start, 1)
    for line in failed:
        report.fail(COMPILING.name, line[:300])


def shared_options(options: argparse.Namespace) -> list[str]:
    """Returns the options that the processes of sections have, too."""
    return ["--rows", options.rows, *(["--full"] if options.full else [])]


def rows_of(name: str, full: bool) -> list[Any]:
    """Returns the rows of a section."""
    return list(importlib.import_module(f"gpu.{name}").rows(full))


def warm(part: str, names: list[str], full: bool, only: str) -> None:
    """Compiles what the rows of this part need; they are dealt out so that parts are alike."""
    import bench_generate
    from gpu.compiling import fill_cache

    own, all_parts, folder = part.split("/", 2)
    rows = [row for name in names for row in rows_of(name, full) if only in row.name]
    fill_cache(rows[int(own) :: int(all_parts)], Path(folder), bench_generate.forget_models)


def measure(name: str, full: bool, only: str) -> None:
    """Runs a section in this process, when the driver says so."""
    from gpu.measure import run

    module = importlib.import_module(f"gpu.{name}")
    for used in ("torch._dynamo", "gptfast.ops.triton"):  # AdamW and operators import them late
        importlib.import_module(used)
    print("imported", flush=True)
    if not sys.stdin.readline():
        return  # the driver has ended
    if hasattr(module, "main"):
        module.main()
    else:
        run(module, full, only)


def facts() -> dict[str, Any]:
    """Returns what the numbers belong to."""
    import triton

    import gptfast

    properties = torch.cuda.get_device_properties(0)
    return {
        "script": "gpu_check",
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gptfast": gptfast.__version__,
        "python": sys.version.split()[0],
    }


def missing() -> str | None:
    """Returns a sentence on what this machine lacks; None if it lacks nothing."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here, and the check needs one"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and the kernels are written in it"
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    names = [each.name for each in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run")
    parser.add_argument(
        "--rows", default="", metavar="SUBSTRING", help="rows with this in the name"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that compile; default: at most 12",
        default=min(WORKERS, os.cpu_count() or 1),
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="all configurations, compiled peers")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/gpu_check.json"
    )
    # Of the processes that this script starts.
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    start = time.monotonic()

    def limit(section: Section) -> float:
        """Returns the seconds that a section has."""
        if options.full:
            return FULL_FACTOR * section.seconds
        return max(1.0, min(section.seconds, start + SECONDS - time.monotonic()))

    options.limit = limit
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the check and returns its exit code."""
    options = parse(argv)
    if options.section:
        measure(options.section, options.full, options.rows)
        return 0
    if options.warm:
        warm(options.warm, options.only, options.full, options.rows)
        return 0
    lacking = missing()
    if lacking is not None:
        print(f"gpu_check: {lacking}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = Report(options.out, facts())
        report.write()
    except OSError as error:
        print(f"gpu_check: {error.filename}: cannot be written ({error.strerror})", file=sys.stderr)
        return EXIT_BAD_INPUT
    chosen = [each for each in SECTIONS if each.name in options.only]
    current = Waiting(CEILINGS, options)
    compile_all(chosen, options, report)
    for each in chosen:
        if each.name != "tests":
            following = Waiting(each, options)
            run_section(current, options, report)
            current = following
    run_section(current, options, report)
    if SECTIONS[-1] in chosen:
        run_tests(options, report)
    if options.rows and not any(each["section"] in options.only for each in report.found["rows"]):
        report.fail("rows", f"none has {options.rows!r} in its name")
    seconds = report.found["seconds"]
    print(", ".join(f"{name} {value} s" for name, value in seconds.items()))
    for each in report.found["failed"]:
        print(f"FAILED: {each}")
    return EXIT_FAILED if report.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
