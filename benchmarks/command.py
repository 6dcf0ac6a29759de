"""The command line of every benchmark: options, the run over the rows, exit codes.

Exit codes: 0: gptfast was verified and timed in all rows; 1: it was not in one; 2: invalid options.
Other contenders that do not run or are wrong leave their row, whose notes say which and why.
"""

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import memory
import show
import torch
from common import DTYPES, OURS, Case, Row, drop_contenders_that_err, measure, peak

from gptfast import data, threads
from gptfast.errors import ConfigError, GptfastError
from gptfast.ops import select
from gptfast.pictures import SUFFIXES

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
QUICK_SECONDS = 0.05


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(
    script: str,
    about: str,
    rows: Iterable[Row] | Callable[[str], Iterable[Row]],
    argv: Sequence[str] | None = None,
    with_memory: bool = False,
) -> int:
    """Runs a benchmark script.

    Args:
        script: Its name without `bench_`.
        about: The description for --help.
        rows: Its rows, whose cases are built one at a time; or a function that makes them of a
            text, which gives the script the option --data.
        argv: The options; None uses those of the process.
        with_memory: Whether the script has the option --memory.

    Returns:
        The exit code.
    """
    try:
        options = parse(script, about, argv, with_memory, with_text=callable(rows))
        chosen = choose(list(rows(text_of(options)) if callable(rows) else rows), options)
    except (GptfastError, OSError) as error:
        print(f"bench_{script}: {sentence(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.threads:
        torch.set_num_threads(options.threads)
    else:
        threads.use_usable_threads()
    result = run(script, chosen, options)
    show.print_result(result)
    if options.out:
        show.write_json(options.out, result)
        partial(options.out).unlink(missing_ok=True)
    if options.plot:
        show.plot(options.plot, result)
    show.print_json(result)
    return EXIT_FAILED if result["failed"] else 0


def sentence(error: Exception) -> str:
    """Returns an error's message in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be written ({error.strerror})"
    return str(error)


def text_of(options: argparse.Namespace) -> str:
    """Returns the text of --data. Raises DataError or OSError if there is none."""
    return data.shakespeare() if options.data is None else data.read_text(options.data)


def parse(
    script: str, about: str, argv: Sequence[str] | None, with_memory: bool, with_text: bool
) -> argparse.Namespace:
    """Parses and checks the options. Raises ConfigError or OSError before anything is timed."""
    parser = _Parser(prog=f"bench_{script}.py", description=about, allow_abbrev=False)
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="default: all"
    )
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="of torch and gptfast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="rows with this in the name"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smallest rows, few rounds, no compile"
    )
    parser.add_argument(
        "--seconds", type=_positive(float), help="to time a row for; default: 3, with --quick 0.05"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios")
    if with_memory:
        parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    if with_text:
        about_data = "the text; default: Shakespeare, downloaded"
        parser.add_argument("--data", type=Path, metavar="FILE", help=about_data)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here")
    reasons = select.unavailable(options.device, torch.float32)
    if reasons:
        raise ConfigError(f"the fused kernels cannot run: {'; '.join(reasons)}")
    check_outputs(options.out, options.plot)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else 3.0)
    options.memory = with_memory and options.memory
    return options


def check_outputs(out: Path | None, plot: Path | None) -> None:
    """Raises ConfigError or OSError if --out or --plot could not be written at the end."""
    if plot and plot.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot: the name must end in {', '.join(SUFFIXES)}, got {plot}")
    if plot:
        show.need_matplotlib()
    for path in (out, plot):
        if path:
            _check_writable(path)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
        return value

    return read


def _check_writable(path: Path) -> None:
    """Raises OSError if the file cannot be written; does not change an existing file."""
    existed = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a"):
        pass
    if not existed:
        path.unlink()


def choose(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Returns the rows that the options select. Raises ConfigError if there are none."""
    named = [row for row in rows if options.only in row.name]
    if not named:
        names = ", ".join(dict.fromkeys(row.name for row in rows))
        raise ConfigError(f"--only {options.only!r} is in no row's name; there are {names}")
    chosen = [
        row for row in named if row.dtype in options.dtype and (row.quick or not options.quick)
    ]
    if not chosen:
        raise ConfigError(f"--only {options.only!r} names no row that --quick has")
    return chosen


def run(script: str, rows: list[Row], options: argparse.Namespace) -> dict[str, Any]:
    """Verifies and times the rows; `show` describes the result."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    with building_on(options.device):
        peaks = {dtype: peak(dtype, options.quick) for dtype in dtypes}
    result: dict[str, Any] = {
        "script": script,
        "card": show.card(),
        "peak": peaks,
        "seconds": options.seconds,
        "rows": [],
        "failed": [],
    }
    for row in rows:
        if options.out and (result["rows"] or result["failed"]):
            show.write_json(partial(options.out), result)
        if not options.quick:
            torch.compiler.reset()  # earlier rows would exhaust the limit of recompilations
        gc.collect()
        torch.manual_seed(0)
        try:
            line = run_row(row, options, result["peak"][row.dtype]["gflops"])
        except AssertionError as error:
            result["failed"].append({"name": row.name, "dtype": row.dtype, "why": str(error)})
            print(f"{row}: FAILED: {error}", file=sys.stderr)
            continue
        result["rows"].append(line)
        print(f"{row}: verified, {line['rounds']} rounds", file=sys.stderr)
    return result


def partial(out: Path) -> Path:
    """Returns the file for the rows so far, which remains if a run is interrupted."""
    return out.with_name(f"{out.name}.partial")


def building_on(device: str) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the default for new tensors.

    torch implements this by a mode that intercepts every call and costs several microseconds per
    operator, so it must be off while rows are timed.
    """
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def run_row(row: Row, options: argparse.Namespace, peak_gflops: float) -> dict[str, Any]:
    """Builds, verifies and times one row. Raises AssertionError if gptfast's results are wrong."""
    with building_on(options.device):
        case = row.build()
        if options.quick:
            for name in case.compiles:
                del case.contenders[name]
    notes = drop_contenders_that_fail(case)
    with building_on(options.device):
        notes |= drop_contenders_that_err(case)
    timing = measure(case.contenders, options.seconds, case.rests)
    line = show.line(row, case, timing, peak_gflops, notes)
    if case.details:
        line["details"] = case.details(timing.seconds[OURS])
    if options.memory:
        names = list(case.contenders)
        del case
        gc.collect()
        line["memory_mib"], note = memory.of_contenders("bench_train", row, names)
        line["notes"] |= note
    return line


def drop_contenders_that_fail(case: Case) -> dict[str, str]:
    """Calls every contender once, removes those that raise, and returns the reasons by name.

    Raises:
        AssertionError: The contender of gptfast raises.
    """
    notes = {}
    for name, contender in list(case.contenders.items()):
        try:
            contender()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            assert name != OURS, f"gptfast does not run: {reason}"
            del case.contenders[name]
            notes[name] = f"does not run: {reason}"
    return notes
