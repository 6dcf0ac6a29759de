"""The kernel files: each includes what it uses, from lower folders, and compiles alone."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import setuptools

KERNELS = Path(__file__).resolve().parents[1] / "csrc" / "kernels"
FILES = sorted(KERNELS.glob("*/*.inl"))

# The folders whose files a folder's files may include, besides kernels.h and their own folder.
LAYERS = {
    "simd": {"threads"},
    "matmul": {"simd", "threads"},
    "attention": {"matmul", "simd", "threads"},
    "layers": {"matmul", "simd", "threads"},
}
ONLY_FOR = {"amx": ["amx"]}


def included(path: Path) -> list[Path]:
    names = re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE)
    return [(path.parent / name).resolve() for name in names]


def compile_text(command: str, text: str) -> str:
    """Compiles the text; returns the compiler's errors."""
    done = subprocess.run(shlex.split(command), input=text, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def parse(path: Path, level: str, command: str, intrinsics: Path) -> str:
    """Returns the compiler's errors for a file of this level that includes only `path`."""
    macros = re.findall(r"^#define .+\n", (KERNELS / f"isa/levels/{level}.cpp").read_text(), re.M)
    if path.stem != "vec":  # precompiled; vec.inl must include them itself
        command += f" -include {shlex.quote(str(intrinsics))}"
    return compile_text(
        f"{command} -fsyntax-only -x c++ -", f'{"".join(macros)}#include "{path}"\n'
    )


def test_every_file_has_its_room():
    assert {path.parent.name for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_file_includes_the_rooms_below_its_own(path):
    layer = path.parent.name
    for other in included(path):
        assert other.exists(), other
        assert other.name == "kernels.h" or other.parent.name in {layer} | LAYERS[layer], other
    text = path.read_text()
    assert re.match(r"(//.*\n)+#pragma once\n\n", text)
    assert text.count("\nnamespace gptfast::GPTFAST_LEVEL {\nnamespace {\n") == 1


def test_files_include_each_other_in_no_circle():
    graph = {path: [other for other in included(path) if other in FILES] for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_each_file_can_be_opened_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py changes it
    facts = runpy.run_path(str(KERNELS.parents[1] / "setup.py"))
    compiler = facts["CXX"]
    if shutil.which(shlex.split(compiler)[0]) is None:
        pytest.skip("there is no C++ compiler")
    commands, intrinsics = {}, {}
    for level in ("avx2", "avx512", "amx"):
        flags = facts["ISA_FLAGS"][level]
        if facts["problem"]("immintrin.h", flags) is not None:
            continue
        commands[level] = f"{compiler} {facts['STANDARD']} {flags}"
        intrinsics[level] = tmp_path / f"{level}.h"
        intrinsics[level].write_text("#include <immintrin.h>\n")
        source, target = (shlex.quote(f"{intrinsics[level]}{end}") for end in ("", ".gch"))
        assert compile_text(f"{commands[level]} -x c++-header {source} -o {target}", "") == ""
    if not commands:
        pytest.skip("the compiler knows none of the levels")

    jobs = [
        (path, level, commands[level], intrinsics[level])
        for path in FILES
        for level in ONLY_FOR.get(path.stem, ["avx2", "avx512"])
        if level in commands
    ]
    with ThreadPoolExecutor(2) as pool:
        errors = "".join(pool.map(lambda job: parse(*job), jobs))
    if errors:
        pytest.fail(errors, pytrace=False)
