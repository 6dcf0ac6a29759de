"""Checks that one source and one build work with every torch of pyproject.toml's range and newer.

    python tests/torch_range.py            `make test-torch-range`: all of them
    python tests/torch_range.py 2.10 2.15  these alone, with tests
    python tests/torch_range.py --cached   no download: the oldest's headers, if kept from before

It downloads each version's wheel without dependencies, compiles the sources that include torch
against the wheel's headers, and keeps the headers. With the oldest version, and with versions newer
than the range, some of the tests run on the extension in the tree, built with the range's newest,
and on the wheel that GPTFAST_WHEEL names, if it names one.
A torch for CUDA does not load without gigabytes of NVIDIA's libraries, which the CPU does not need.
Stubs replace them, in which every function returns the error "no device".
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pooch
import pybind11

from gptfast.info import build_info, stale_build, torch_range

Version = tuple[int, int]

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "ops").glob("*.cpp"))]
OLDEST, NEWEST = torch_range((ROOT / "pyproject.toml").read_text())
TESTS = ("ops", "model", "optimizer", "generation", "checkpoint", "wheel")
CACHE = Path(pooch.os_cache("gptfast")) / "torch-headers"
HEADERS = ("torch/csrc/stable", "torch/csrc/inductor/aoti_torch", "torch/headeronly", "pybind11")


class Failure(Exception):
    """Something does not work with a version; the message is one sentence."""


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 if a version fails, 2 if the build is stale or of another torch."""
    if arguments == ["--cached"]:
        if not headers(OLDEST).is_dir():
            print(f"left out: `make test-torch-range` has kept no headers of {name(OLDEST)} here")
            return 0
        return int(not passes(compile_sources, OLDEST))
    built = build_info().get("torch", "none")
    if not built.startswith("{}.{}.".format(*NEWEST)) or stale_build():
        print(f"needs an up-to-date build with {name(NEWEST)}, found one with torch {built}")
        return 2
    asked = [(int(major), int(minor)) for major, minor in (word.split(".") for word in arguments)]
    failed = []
    for version in asked or zip(itertools.repeat(OLDEST[0]), itertools.count(OLDEST[1])):
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
            if not passes(unpack, version, Path(folder)):
                if version > NEWEST and not asked:
                    break  # there is no newer version
                failed.append(version)
                continue
            good = passes(compile_sources, version)
            if asked or version == OLDEST or version > NEWEST:
                good &= passes(run_tests, version, Path(folder))
            if not good:
                failed.append(version)
    print("FAILED: " + ", ".join(map(name, failed)) if failed else "all good")
    return int(bool(failed))


def name(version: Version) -> str:
    return "torch {}.{}".format(*version)


def headers(version: Version) -> Path:
    return CACHE / "{}.{}".format(*version)


def passes(step: Callable[..., str], *arguments: Any) -> bool:
    """Runs a step for a version, its first argument; prints the result, returns the success."""
    try:
        print(f"{name(arguments[0])}: {step(*arguments)}", flush=True)
    except Failure as failure:
        print(f"{name(arguments[0])}: {failure}", flush=True)
        return False
    return True


def unpack(version: Version, folder: Path) -> str:
    """Downloads a version's wheel and unpacks it into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    done = run(*command, "torch=={}.{}.*".format(*version))
    if done.returncode != 0:
        raise Failure(f"pip has no wheel ({last_line(done.stderr)})")
    (wheel,) = folder.glob("*.whl")
    ZipFile(wheel).extractall(folder)
    wheel.unlink()
    kept = folder / "headers"
    for part in HEADERS:
        shutil.copytree(folder / "torch" / "include" / part, kept / part)
    shutil.rmtree(headers(version), ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    shutil.move(kept, headers(version))
    return f"unpacked {wheel.name}"


def compile_sources(version: Version) -> str:
    """Compiles the files that include torch, with torch's copy of pybind11 first on the path."""
    folders = [headers(version), pybind11.get_include(), sysconfig.get_path("include")]
    target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST)
    command = [os.environ.get("CXX") or "c++", "-std=c++20", "-O0", target]
    command += [f"-I{folder}" for folder in folders] + ["-c", "-o", os.devnull]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for done in pool.map(lambda source: run(*command, source), SOURCES):
            if done.returncode != 0:
                print(done.stderr)
                raise Failure(f"{Path(done.args[-1]).name} does not compile against its headers")
    return f"{len(SOURCES)} files compile against its headers"


def run_tests(version: Version, folder: Path) -> str:
    """Runs tests with the torch in `folder` and the extension in the tree."""
    if sys.platform == "linux":
        stand_in_for_nvidia(folder / "torch" / "lib")
    path = os.pathsep.join([str(ROOT), str(folder)])
    code = "import torch, gptfast._C; print(torch.__version__)"
    found = run(sys.executable, "-c", code, PYTHONPATH=path)
    if not found.stdout.startswith("{}.{}.".format(*version)):
        raise Failure(f"the extension does not load ({last_line(found.stderr)})")
    tests = [f"tests/test_{name}.py" for name in TESTS]
    # A fixed seed, so that every version runs the same random cases.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    done = run(*pytest, *tests, PYTHONPATH=path)
    if done.returncode != 0:
        print(done.stdout, done.stderr)
        raise Failure(f"with {found.stdout.strip()}: {last_line(done.stdout)}")
    return f"with {found.stdout.strip()}: {last_line(done.stdout)}"


def stand_in_for_nvidia(folder: Path) -> None:
    """Builds one stub of all NVIDIA functions that torch needs; links all library names to it."""
    libraries = list(folder.glob("*.so*"))
    imports = run("nm", "-D", "--undefined-only", "--with-symbol-versions", *libraries).stdout
    functions = dict(re.findall(r" U ((?:__cuda|cu|nccl|nv)\w+)(?:@(\S+))?", imports))
    dynamic = run("readelf", "-d", *libraries).stdout
    needed = set(re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nv).*)\]", dynamic))
    missing = needed - {path.name for path in libraries}
    if not missing:
        return
    source, versions = folder / "no_device.c", folder / "no_device.map"
    source.write_text("".join(f"int {f}(void) {{ return 100; }}\n" for f in functions))
    groups = {
        group: [f for f in functions if functions[f] == group] for group in functions.values()
    }
    versions.write_text(
        "".join(f"{group} {{ {'; '.join(names)}; }};\n" for group, names in groups.items() if group)
    )
    library = folder / "libno_device.so"
    compiler = ["cc", "-shared", "-fPIC", "-w", f"-Wl,--version-script={versions}"]
    done = run(*compiler, source, "-o", library)
    if done.returncode != 0:
        raise Failure(f"no stand-ins for NVIDIA's libraries ({last_line(done.stderr)})")
    for needed_name in missing:
        (folder / needed_name).symlink_to(library.name)


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
