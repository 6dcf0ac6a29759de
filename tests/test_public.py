"""The public names, for programs that run and for type checkers, and a program that uses them.

`make lint` lets `mypy --strict` check the program.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import gptfast

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "fixtures" / "user_script.py"


def names_for_type_checkers() -> dict[str, str]:
    """The names that gptfast/__init__.py imports under TYPE_CHECKING, and whence."""
    tree = ast.parse(Path(gptfast.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {name.name: f"{node.module}" for node in imports for name in node.names}


def test_programs_and_type_checkers_see_the_same_names() -> None:
    homes = {name: f"gptfast.{home}" for home, names in gptfast._HOMES.items() for name in names}
    assert names_for_type_checkers() == homes | {"ops": "gptfast"}
    assert sorted(gptfast.__all__) == sorted(names_for_type_checkers())
    for name, home in homes.items():
        assert getattr(gptfast, name) is getattr(sys.modules[home], name)


def test_a_users_program_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("character '?' at position 0")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"user", "copy"}
