"""The wheel: what is in it, and that it works in a new environment without a compiler.

GPTFAST_WHEEL names it: `make test-wheel` builds one and sets it. The environment has the torch that
runs the tests, whichever that is, so `make test-torch-range` tests the wheel with others.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import gptfast
from gptfast.info import build_info, info, torch_range

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "fixtures" / "user_script.py"
WHEEL = os.environ.get("GPTFAST_WHEEL", "")

pytestmark = pytest.mark.skipif(not WHEEL, reason="GPTFAST_WHEEL names none: see make test-wheel")


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    return zipfile.ZipFile(ROOT / WHEEL)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (each for each in wheel.namelist() if each.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_the_wheel_has_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = (name for name in wheel.namelist() if not name.endswith("/"))
    names = {name for name in files if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gptfast").rglob("*.py")}
    (extension,) = names - sources - {"gptfast/py.typed", "gptfast/_build_info.json"}
    assert re.fullmatch(r"gptfast/_C\..*\.so", extension)
    assert names - {extension} == sources | {"gptfast/py.typed", "gptfast/_build_info.json"}
    for name in sources:
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    facts = Parser().parsestr(metadata(wheel, "METADATA"))
    assert (facts["Name"], facts["Version"]) == ("gptfast-kernels", gptfast.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (own,) = (each for each in project["dependencies"] if each.startswith("torch"))
    (found,) = (each for each in facts.get_all("Requires-Dist", []) if each.startswith("torch"))
    assert torch_range(found) == torch_range(own)
    assert "gptfast = gptfast.cli:main" in metadata(wheel, "entry_points.txt")
    assert "MIT License" in metadata(wheel, "licenses/LICENSE")


def test_the_wheel_has_the_kernels_of_these_sources(wheel: zipfile.ZipFile) -> None:
    """Its record is that of a build in the tree, but for the commit."""
    built = json.loads(wheel.read("gptfast/_build_info.json"))
    assert built["reason"] is None
    assert built["csrc"] == build_info()["csrc"]
    assert built["isa"] == build_info()["isa"]


def test_the_wheel_is_a_manylinux_wheel(wheel: zipfile.ZipFile) -> None:
    """So auditwheel has found it to need nothing but glibc, libstdc++ and torch's libraries."""
    tags = re.findall(r"^Tag: (\S+)-(\S+)-(\S+)$", metadata(wheel, "WHEEL"), re.M)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert {tag[:2] for tag in tags} == {(python, python)}
    assert all(platform.startswith("manylinux_") for _, _, platform in tags)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, and what it depends on from that of the tests."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(ROOT / WHEEL)]
    # On a PYTHONPATH pip could find the checkout, which setuptools has described, and do nothing.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, *install], check=True, env=env)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file ends up on the path, but .pth files in that place are not read: the
    # editable install of the checkout, which may be there, stays unknown.
    known = (path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    places = dict.fromkeys([str(Path(torch.__file__).parents[1]), *known])
    (packages / "dependencies.pth").write_text("\n".join(places) + "\n")
    return folder


def run(environment: Path, command: str, *arguments: str) -> str:
    """Runs a command of the environment, outside of the checkout, where there is no compiler."""
    names = ("HOME", "OMP_NUM_THREADS", "LANG")
    env = {name: os.environ[name] for name in names if name in os.environ}
    env |= {"PATH": str(environment / "bin"), "CXX": "/nonexistent", "COLUMNS": "500"}
    done = subprocess.run(
        [str(environment / "bin" / command), *arguments],
        cwd=environment.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_environment_has_the_kernels(environment: Path) -> None:
    shown = run(environment, "gptfast", "info")
    rows = dict(re.findall(r"^(\w[\w ]*?)  +(.+?) *$", shown, re.M))
    assert rows["gptfast"] == gptfast.__version__
    oldest, newest = info()["torch_range"]
    assert rows["torch"] == f"{torch.__version__} (tested: {oldest} to {newest})"
    assert rows["fused kernels"] == "available"
    assert rows["built from"].endswith(build_info()["csrc"][:12])
    assert re.search(r"^OpenMP +\S+ *\nbuilt with ", shown, re.M)  # a single library


def test_a_program_trains_and_generates_there(environment: Path) -> None:
    code = f"""
import runpy
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
import gptfast
from gptfast.info import openmp_runtimes
print(gptfast.__file__, len(openmp_runtimes()))
"""
    place, runtimes = run(environment, "python", "-c", code).splitlines()[-1].split()
    assert Path(place).is_relative_to(environment)
    assert runtimes == "1"
    assert (environment.parent / "runs" / "user" / "model.safetensors").is_file()
