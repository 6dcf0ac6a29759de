"""The build: linked libraries, choice of the instruction set, and use without the extension."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pybind11
import pytest
from torch.utils.cpp_extension import include_paths

from gptfast.info import build_info, torch_range
from gptfast.ops import select
from gptfast.training.watching.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = select.extension()
SET_UP = ("pip install -e . && gptfast demo", 'pip install -e ".[test]" && pytest')

needs_extension = pytest.mark.skipif(
    EXTENSION is None, reason=f"no compiled part: {select.extension_error}"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")


def run(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with `env` added to the environment; empty variables are removed."""
    full = {**os.environ, "OMP_NUM_THREADS": "2", **env}
    full = {name: value for name, value in full.items() if value}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=300)


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# What the extension links to


def test_extension_loads_where_it_was_built():
    record = build_info()
    if not record or record["reason"] is not None:
        pytest.skip("the extension was not built")
    assert EXTENSION is not None, select.extension_error


@needs_extension
@needs_linux
def test_one_openmp_runtime_in_the_process():
    code = """
import torch, gptfast
from gptfast.info import openmp_runtimes
q = torch.randn(2, 2, 64, 32)
gptfast.ops.causal_attention(q, q, q)
torch.randn(256, 256) @ torch.randn(256, 256)
print(len(openmp_runtimes()))
"""
    done = run("-c", code)
    assert done.stdout.strip() == "1", done.stderr


@needs_extension
@needs_linux
def test_extension_needs_no_openmp_libmvec_or_torch_python():
    dynamic = tool("readelf", "-d", EXTENSION.__file__)
    needed = re.findall(r"NEEDED.*\[(.+?)\.so", dynamic)
    assert "libtorch_cpu" in needed
    assert not {"libgomp", "libomp", "libiomp5", "libmvec", "libtorch_python"} & set(needed)


@needs_extension
@needs_linux
def test_extension_stands_on_the_stable_abi_only():
    undefined = tool("nm", "-D", "--undefined-only", "-C", EXTENSION.__file__)
    assert "aoti_torch" in undefined or "torch_" in undefined
    assert re.findall(r"U (?:at|c10|torch)::.*", undefined) == []


def test_kernel_objects_share_no_function():
    objects = sorted((ROOT / "build" / "temp").glob("isa_*.o"))
    if not objects:
        pytest.skip("no kernel objects in build/temp")
    symbols = tool("nm", "-A", *map(str, objects)).splitlines()
    weak = [line for line in symbols if re.search(r" [WVu] (?!DW\.ref\.)", line)]
    assert weak == []


# The choice of the instruction set


ASK = "import torch; from gptfast import _C; print(_C.isa_current())"


@needs_extension
def test_isa_request_of_an_unknown_level():
    done = run("-c", ASK, GPTFAST_CPU_ISA="avx3")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ValueError: GPTFAST_CPU_ISA: the instruction set must be one of generic,"
    )
    assert last.endswith("got 'avx3'")


@needs_extension
def test_isa_request_of_a_level_that_cannot_run():
    reasons = {level: reason for level, reason in EXTENSION.isa_levels().items() if reason}
    if not reasons:
        pytest.skip("every level can run here")
    for level, reason in reasons.items():
        done = run("-c", ASK, GPTFAST_CPU_ISA=level)
        assert done.returncode != 0
        expected = f"the instruction set '{level}' is not available: {reason}"
        assert done.stderr.strip().endswith(f"ValueError: GPTFAST_CPU_ISA: {expected}")


@needs_extension
def test_isa_request_is_obeyed():
    assert run("-c", ASK, GPTFAST_CPU_ISA="generic").stdout.strip() == "generic"


@needs_extension
def test_isa_default_is_the_fastest_level():
    available = [level for level, reason in EXTENSION.isa_levels().items() if reason is None]
    if available[-1] == "avx512_bf16" and "Intel" in cpu_name():
        available.pop()  # not the default: its bfloat16 products have half of float32's rate
    found = run("-c", ASK, GPTFAST_CPU_ISA="", ATEN_CPU_CAPABILITY="").stdout.strip()
    assert found == available[-1]


@needs_extension
@pytest.mark.parametrize(("capability", "highest"), [("default", "generic"), ("avx2", "avx2")])
def test_isa_default_stays_below_the_limit_of_torch(capability, highest):
    if EXTENSION.isa_levels()[highest] is not None:
        pytest.skip(f"{highest} cannot run here")
    found = run("-c", ASK, GPTFAST_CPU_ISA="", ATEN_CPU_CAPABILITY=capability).stdout.strip()
    assert found == highest


@needs_extension
def test_isa_set_changes_the_level_or_says_why_not():
    before = EXTENSION.isa_current()
    try:
        for level, reason in EXTENSION.isa_levels().items():
            if reason is None:
                EXTENSION.isa_set(level)
                assert EXTENSION.isa_current() == level
            else:
                with pytest.raises(ValueError, match=f"'{level}' is not available: "):
                    EXTENSION.isa_set(level)
        with pytest.raises(ValueError, match="must be one of generic, avx2"):
            EXTENSION.isa_set("sse")
    finally:
        EXTENSION.isa_set(before)


@needs_extension
def test_threads_are_those_of_torch():
    code = "import torch; from gptfast import _C; torch.set_num_threads(3); print(_C.num_threads())"
    assert run("-c", code).stdout.strip() == "3"


# Installation without the extension


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the files that setup.py reads, without build results."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("_C*.so", "_build_info.json", "__pycache__")
    for name in ("gptfast", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")


def build_record(tree: Path) -> dict:
    return json.loads((tree / "gptfast" / "_build_info.json").read_text())


def test_install_without_the_extension_runs_the_reference(tree):
    stale = tree / "gptfast" / "_C.cpython-30-none.so"
    stale.touch()
    done = run(*BUILD, cwd=tree, GPTFAST_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr
    assert build_record(tree)["reason"] == "installed with GPTFAST_BUILD_EXT=0"
    assert not stale.exists()

    # The finder of an editable install would load this tree's extension for the copy.
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
import torch, gptfast
from gptfast.info import info
model = gptfast.GPT(gptfast.GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16))
tokens = torch.arange(8).reshape(2, 4) % 5
model.loss(tokens, tokens).backward()
print(tuple(model(tokens).shape))
print(info()["fused"])
"""
    done = run("-c", code, cwd=tree, PYTHONPATH=str(tree))
    assert done.stdout.splitlines() == [
        "(2, 4, 5)",
        "not available: installed with GPTFAST_BUILD_EXT=0",
    ], done.stderr


def test_install_without_a_compiler(tree):
    done = run(*BUILD, cwd=tree, CXX="/no/such/c++")
    assert done.returncode == 0, done.stderr
    assert "gptfast gets no compiled part: no working C++ compiler" in done.stderr
    assert "/no/such/c++" in build_record(tree)["reason"]


def test_mistake_in_the_sources_fails_the_install(tree):
    if shutil.which(os.environ.get("CXX") or "c++") is None:
        pytest.skip("there is no C++ compiler")
    for source in (tree / "csrc" / "kernels" / "isa" / "levels").glob("*.cpp"):
        source.write_text("#error broken on purpose\n")
    done = run(*BUILD, cwd=tree, MAX_JOBS="1")
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr
    assert not (tree / "gptfast" / "_build_info.json").exists()


# Options and requirements of the build


def test_range_of_torch_is_one():
    """The range is named for build, run time and developers, and as the oldest ABI."""
    named = {
        place: re.findall(r'"(torch[<>=][^"]+)"', (ROOT / place).read_text())
        for place in ("pyproject.toml", "CONTRIBUTING.md")
    }
    assert len(named["pyproject.toml"]) == 2 and len(named["CONTRIBUTING.md"]) == 1
    (requirement,) = set(sum(named.values(), []))
    (major, minor), _ = torch_range(requirement)
    target = f'"TORCH_TARGET_VERSION": "0x{major:02x}{minor:02x}000000000000"'
    assert target in (ROOT / "setup.py").read_text()


def test_readme_installs_all_but_torch_beside_a_torch():
    """pip must not resolve dependencies there, so the line names all, for build and run time."""
    readme, project = ((ROOT / name).read_text() for name in ("README.md", "pyproject.toml"))
    (line,) = re.findall(
        r"`pip install (.+) && pip install --no-build-isolation --no-deps -e \.`", readme
    )
    lists = re.findall(r"^(?:requires|dependencies) = (\[.+\])$", project, re.MULTILINE)
    needed = {name for names in lists for name in json.loads(names)}
    assert set(shlex.split(line)) == {name for name in needed if not name.startswith("torch")}


def test_source_distribution_has_what_git_tracks(tmp_path):
    """What a build needs is among it, and so are the tests, and nothing that lies about."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    listed = tool("git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard")
    wanted = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    # The list of an earlier distribution, in the tree, would be read otherwise.
    options = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    done = run("setup.py", "--quiet", *options)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        found = {member.name.partition("/")[2] for member in file if member.isfile()}
    assert {name for name in found if "egg-info" not in name} - {"PKG-INFO", "setup.cfg"} == wanted
    assert {"setup.py", "pyproject.toml", "csrc/bindings.cpp", "LICENSE"} <= found


def test_bindings_survive_the_pybind11_of_torch(tmp_path):
    """The pybind11 of torch 2.10 to 2.12 rejects a target version and can be first on the path."""
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        pytest.skip("there is no C++ compiler")
    copy = tmp_path / "pybind11" / "pybind11.h"
    copy.parent.mkdir()
    refusal = "#ifdef TORCH_TARGET_VERSION\n#error refused\n#endif\n"
    copy.write_text(refusal + "#include_next <pybind11/pybind11.h>\n")
    folders = [str(tmp_path), *include_paths(), pybind11.get_include()]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{folder}" for folder in [*folders, sysconfig.get_path("include")]]
    done = subprocess.run(
        [*command, str(ROOT / "csrc" / "bindings.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_setup_has_flags_for_every_level():
    (flags,) = re.findall(r"^ISA_FLAGS = \{(.+)\}$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    levels = {path.stem for path in (ROOT / "csrc" / "kernels" / "isa" / "levels").glob("*.cpp")}
    assert levels == set(re.findall(r'"(\w+)":', flags))
    assert len(levels) == 5


@pytest.mark.parametrize("line", SET_UP)
def test_ci_runs_the_set_up_lines_of_the_readme(line):
    assert line in (ROOT / "README.md").read_text()
    assert f"bash -c '{line}'" in (ROOT / ".ci" / "run").read_text()
