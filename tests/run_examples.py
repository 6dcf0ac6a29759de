"""Executes the notebooks of examples/ and writes them with their results, as they are committed.

    python tests/run_examples.py              `make examples`: all of them, in some minutes
    python tests/run_examples.py lesson       those of these names

A notebook is executed in an empty folder, which is removed: it reads and writes nothing else. What
would differ from machine to machine, such as versions and times of cells, is left out.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from gptfast.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LENGTH = "GPTFAST_EXAMPLES"  # the variable that notebooks ask
CELL_SECONDS = 900  # in which each cell has to end


def read(path: Path) -> NotebookNode:
    """Reads a notebook of the current format."""
    return nbformat.read(path, as_version=4)


def execute(notebook: NotebookNode, folder: Path, length: str = "full") -> None:
    """Executes a notebook, which gets its results.

    Args:
        notebook: The notebook.
        folder: Where its kernel runs.
        length: "full", or "short" for few steps of training.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an exception.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {LENGTH: length, "PYTHONPATH": path, "IPYTHONDIR": str(folder / ".ipython")}
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=os.environ | settings)


def normalise(notebook: NotebookNode) -> None:
    """Leaves nothing but cells and results: no versions, no settings of an editor."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    for cell in notebook.cells:
        cell.metadata = NotebookNode()


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook, whole or not at all."""
    nbformat.validate(notebook)
    write_atomic({path: f"{nbformat.writes(notebook)}\n".encode()})


def main(names: list[str]) -> int:
    """Returns the exit code: 2 for a name that no notebook has."""
    known = {path.stem: path for path in NOTEBOOKS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"there is no notebook {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names or known:
        print(f"{name} ...", flush=True)
        notebook = read(known[name])
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        normalise(notebook)
        write(notebook, known[name])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
