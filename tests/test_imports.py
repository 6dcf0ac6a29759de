"""Imports within the package: they go one way, and `import gptfast` loads little."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# For each layer: its modules and packages, and the other layers that it may import.
BELOW_TRAINING = "errors markup pictures config ops data model checkpoint formats"
LAYERS = {
    "errors": ("errors checks console files lock", ""),
    "markup": ("markup", ""),
    "pictures": ("pictures", "errors"),
    "config": ("config run_file threads", "errors"),
    "ops": ("ops captures", "errors"),
    "data": ("abc_corpus bpe bpe_files data encoding presets tokenizer", "errors config"),
    "model": ("heads initial model modules plain summary", "errors markup config ops"),
    "checkpoint": ("checkpoint integrity storable", "errors config ops data model"),
    "formats": ("formats", "errors config ops data model checkpoint"),
    "attention_plots": ("attention_plots", "errors pictures model"),
    "generation": ("generation", "errors markup config ops data model"),
    "training": ("training", f"{BELOW_TRAINING} generation"),
    "public": ("gptfast", f"{BELOW_TRAINING} generation training"),  # the names of gptfast itself
    "lm_eval": ("lm_eval", "errors data model public"),
    "info": ("info", "errors config ops training"),
    "reproduction": ("reproduction", f"{BELOW_TRAINING} generation training info"),
    "cli": (
        "cli __main__",
        f"{BELOW_TRAINING} attention_plots generation training public info reproduction",
    ),
    "testing": ("testing", ""),  # for tests and benchmarks
}


def name_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    return {name_of(file, root): file for file in (root / "gptfast").rglob("*.py")}


def imported(file: Path, known: set[str], types: bool = True) -> Iterator[tuple[int, str]]:
    """Yields line and name of the package's modules that a file imports, also inside functions.

    `types=False` skips imports under `if TYPE_CHECKING`.
    """
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                names.append(inner if inner in known else node.module or "")
        for name in names:
            if name == "gptfast" or name.startswith("gptfast."):
                yield getattr(node, "lineno", 0), name


def layer_of(module: str) -> str:
    name = module.removeprefix("gptfast.").partition(".")[0]
    found = [layer for layer, (names, _) in LAYERS.items() if name in names.split()]
    assert found, f"{module} is in no layer: give it a place in LAYERS"
    return found[0]


def forbidden(root: Path = ROOT) -> list[str]:
    """Returns the imports that LAYERS does not allow, with file and line."""
    found = []
    files = modules(root)
    for module, file in files.items():
        layer = layer_of(module)
        for line, name in imported(file, set(files)):
            if name == "gptfast._C":
                continue
            if layer_of(name) not in (layer, *LAYERS[layer][1].split()):
                found.append(f"{file.relative_to(root)}:{line}: {layer} imports {name}")
    return sorted(found)


def cycle(root: Path = ROOT) -> list[str]:
    """Returns a cycle of imports, including those inside functions; [] if there is none."""
    files = modules(root)
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        graph[module] = set()
        for _, name in imported(file, set(files), types=False):
            parts = name.split(".")
            for i in range(1, len(parts) + 1):  # an import also runs the parent packages
                outer = ".".join(parts[:i])
                if outer in files and not f"{module}.".startswith(f"{outer}."):
                    graph[module].add(outer)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_go_one_way() -> None:
    assert forbidden() == []


def test_nothing_imports_itself_by_others() -> None:
    assert cycle() == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("ops/library.py", "from gptfast.model import GPT"),
        ("errors.py", "import gptfast.config"),
        ("model.py", "def f():\n    from gptfast import training"),
        ("training/run.py", "from gptfast.info import info"),
        ("generation/request.py", "from gptfast.info import info"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    for module in modules().values():
        copy = tmp_path / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(module.read_text(encoding="utf-8"), encoding="utf-8")
    changed = tmp_path / "gptfast" / file
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    [found] = forbidden(tmp_path)
    assert found.startswith(f"gptfast/{file}:")


@pytest.mark.parametrize("inside", ["", "def f():\n    "])
def test_a_circle_is_found(tmp_path: Path, inside: str) -> None:
    package = tmp_path / "gptfast"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text("import gptfast.modules\n")
    (package / "modules.py").write_text(f"{inside}from gptfast import model\n")
    assert set(cycle(tmp_path)) == {"gptfast.model", "gptfast.modules"}


COMMANDS = " ".join(
    name_of(file, ROOT).removeprefix("gptfast.")
    for file in (ROOT / "gptfast" / "cli" / "commands").glob("*.py")
)
# The modules that a statement loads: of the package, and expensive or optional ones.
SLOW = {"torch", "triton", "matplotlib", "rich.progress", "safetensors"}
LOADED = {
    "import gptfast": "",
    "import gptfast.cli": f"cli cli.cli cli.options {COMMANDS} errors files",
    "from gptfast import GPTConfig, TrainConfig": "checks config errors",
    "import gptfast.presets": (
        "abc_corpus checks config data data.corpora data.shuffle data.texts data.windows errors "
        "presets torch"
    ),
}


@pytest.mark.parametrize("statement", LOADED)
def test_what_is_not_needed_is_not_loaded(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = set(done.stdout.split())
    loaded = {name for name in found if name.startswith("gptfast.")} | found & SLOW
    assert {name.removeprefix("gptfast.") for name in loaded} == set(LOADED[statement].split())
