"""Builds the harness: kernels and engine under sanitizers, once per level.

Flags come from setup.py; objects that are up to date stay. Of a level that this machine cannot run
the source is only checked. MAX_JOBS limits the compiler processes.

Usage: python tests/sanitize/build.py DIRECTORY SANITIZERS, as g++ names them
"""

import hashlib
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

# Little optimised, so that a report names the lines of the source.
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -Wall -fno-sanitize-recover=all"


def facts_of_setup() -> dict[str, Any]:
    """The names that setup.py defines, without the build that it would start."""
    # The tiles of AMX in plain memory, on a processor that has them too: their loads and stores
    # are own assembly, which no sanitizer sees.
    os.environ["GPTFAST_AMX_EMULATED"] = "1"
    setuptools.setup = lambda **_: None
    return runpy.run_path(str(ROOT / "setup.py"))


def digest(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def compile_object(command: str, source: Path, target: Path, state: str) -> str:
    """Runs the command unless `target` was made by it from this state of the files."""
    command = f"{command} -c {shlex.quote(str(source))} -o {shlex.quote(str(target))}"
    stamp = target.with_suffix(".stamp")
    state = f"{state} {command}"
    if not (target.exists() and stamp.exists() and stamp.read_text() == state):
        stamp.unlink(missing_ok=True)
        subprocess.run(f"set -x; {command}", shell=True, check=True)
        stamp.write_text(state)
    return shlex.quote(str(target))


def runnable(command: str, directory: Path, levels: list[str]) -> list[str]:
    """Returns the levels that this machine runs, as the library itself finds out."""
    program = directory / "levels"
    files = HERE.parent / "levels.cpp", CSRC / "kernels/isa/dispatch.cpp", "-o", program
    words = " ".join(shlex.quote(str(each)) for each in files)
    subprocess.run(f"{command} {words}", shell=True, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return [isa for isa in levels if isa in found]


def check_source(command: str, source: Path) -> None:
    """Finds mistakes in the sources of a level that this machine cannot run, in seconds."""
    command += f" -fsyntax-only {shlex.quote(str(source))}"
    subprocess.run(f"set -x; {command}", shell=True, check=True)


def main(directory: Path, sanitizers: str) -> None:
    sanitized = f"{FLAGS} -fsanitize={sanitizers}"
    facts = facts_of_setup()
    directory.mkdir(parents=True, exist_ok=True)
    problems = {}
    for isa, flags in facts["ISA_FLAGS"].items():
        problems[isa] = facts["problem"]("vector" if isa == "generic" else "immintrin.h", flags)
    built = [isa for isa, line in problems.items() if line is None]
    for isa, line in problems.items():
        if line is not None:
            print(f"not built: {isa}: {line}")

    cxx = facts["CXX"]
    headers = [*CSRC.rglob("*.h"), *HERE.glob("*.h")]
    kernels = digest((CSRC / "kernels").rglob("*.*"))
    plain = f"{cxx} {sanitized} {facts['STANDARD']} -DGPTFAST_AMX_EMULATED=1"
    run = runnable(plain, directory, built)
    plain += "".join(f" -DGPTFAST_HAVE_{isa.upper()}=1" for isa in run)
    jobs, checks = [], []
    for isa in built:
        command = f"{cxx} {sanitized} {facts['KERNEL_FLAGS']} {facts['ISA_FLAGS'][isa]}"
        source = CSRC / f"kernels/isa/levels/{isa}.cpp"
        if isa in run:
            jobs.append((command, source, directory / f"isa_{isa}.o", kernels))
        else:
            checks.append((command, source))
    others = [CSRC / "kernels" / f"{name}.cpp" for name in ("isa/dispatch", "threads/team")]
    others += sorted((CSRC / "engine").glob("*.cpp"))
    for source in [*others, *sorted(HERE.glob("*.cpp"))]:
        target = directory / f"{source.parent.name}_{source.stem}.o"
        jobs.append((plain, source, target, digest([source, *headers])))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        compiling = pool.map(lambda job: compile_object(*job), jobs)
        list(pool.map(lambda check: check_source(*check), checks))
        objects = list(compiling)
    harness = shlex.quote(str(directory / "harness"))
    subprocess.run(f"{cxx} {sanitized} {' '.join(objects)} -o {harness}", shell=True, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
