"""The notebooks of examples/: all of their cells run, and what is committed of them can be read."""

import re
from pathlib import Path

import pytest

for name in ("nbclient", "ipykernel", "matplotlib"):
    pytest.importorskip(name, reason=f"notebooks are executed by {name}, of the extra `test`")
import nbformat  # noqa: E402
from nbformat import NotebookNode  # noqa: E402
from run_examples import NOTEBOOKS, execute, main, normalise, read, write  # noqa: E402

from gptfast import cli  # noqa: E402

MOST_BYTES = 300_000  # of a notebook: GitHub shows larger ones slowly
MOST_SENTENCES = 3  # in the text before a cell
PLACES = r"(?<![\w.<])/(?:home|media|mnt|opt|private|root|tmp|usr|var|work|Users)/|[A-Z]:\\\\"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: NotebookNode) -> str:
    """What a cell shows, as text."""
    texts = [each.get("text", "") for each in cell.outputs]
    types = ("text/plain", "text/html")
    return "".join(
        texts + [each.get("data", {}).get(t, "") for each in cell.outputs for t in types]
    )


def new(*cells: str) -> NotebookNode:
    return nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))


def check_outputs(notebook: NotebookNode) -> None:
    """Fails where a cell did not run in its place, or shows an error, a warning or a path."""
    assert [cell.execution_count for cell in code(notebook)] == [
        i + 1 for i in range(len(code(notebook)))
    ]
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output
        assert not re.search(PLACES, shown(cell)), cell.source
        if "gptfast.train(" in cell.source:
            [bar] = cell.outputs  # which was replaced all the time
            assert "held-out loss" in bar.data["text/plain"]
            assert "<progress" not in bar.data["text/html"]


@each_notebook
def test_every_cell_runs(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    execute(notebook, tmp_path, "short")
    check_outputs(notebook)
    assert sum("assert" in cell.source for cell in code(notebook)) >= 4


@each_notebook
def test_what_is_committed_has_the_results_of_a_whole_run(path: Path) -> None:
    notebook = read(path)
    check_outputs(notebook)
    steps = re.search(r"STEPS = \d+ if SHORT else (\d+)", code(notebook)[0].source)
    assert steps is not None
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert any(f"{steps[1]}/{steps[1]} " in shown(cell) for cell in code(notebook))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    again = read(path)
    normalise(again)
    assert again == notebook
    assert path.stat().st_size < MOST_BYTES


@each_notebook
def test_a_text_says_what_each_cell_is_for(path: Path) -> None:
    cells = read(path).cells
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            sentences = re.findall(r"[.?!:]\)?(?=\s[A-Z(`*]|\s*$)", before.source)
            assert 1 <= len(sentences) <= MOST_SENTENCES, before.source


@each_notebook
def test_links_and_commands_are_right(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    for text in texts:
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert (path.parent / link).exists(), link
        for line in re.findall(r"(?:^|`)gptfast ([^`\n]+)", text.replace("\\\n", ""), re.M):
            command, *words = line.split()
            known = [command, words[0]] if command in cli.cli.CHOOSING else [command]
            assert cli.main([*known, "--help"]) == 0
            out = capsys.readouterr().out
            assert [word for word in words if word[:2] == "--" and f" {word}" not in out] == []


TRAIN = """
import os, signal, gptfast
class Interrupts(gptfast.Callback):
    def on_step(self, run):
        if run.state.step == 20:
            os.kill(os.getpid(), signal.SIGINT)
tiny = {"n_layer": 1, "n_embd": 16, "batch_size": 2, "val_fraction": 0.001}
"""


def test_the_bar_of_a_notebook_is_one_output(tmp_path: Path) -> None:
    notebook = new(
        TRAIN,
        'gptfast.train("abc", steps=30, eval_every=1, **tiny);',
        'gptfast.train("abc", steps=30, eval_every=10, callbacks=[Interrupts()], **tiny);',
    )
    execute(notebook, tmp_path)
    whole, interrupted = ([output] for [output] in (cell.outputs for cell in notebook.cells[1:]))
    lines = whole[0].data["text/plain"].splitlines()
    assert lines[0] == "(18 lines before)" and lines[1].startswith("step 19: train loss")
    assert len(lines) == 14 and lines[-1].startswith("30/30  loss ")
    assert "left" not in lines[-1]
    lines = interrupted[0].data["text/plain"].splitlines()
    assert [line[:7] for line in lines] == ["step 10", "step 20", "interru", "20/30  "]
    assert lines[2] == "interrupted at step 20 of 30, nothing was saved"
    for [output] in (whole, interrupted):
        assert output.output_type == "display_data" and "<progress" not in output.data["text/html"]


def test_an_error_in_a_cell_is_an_error(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="1 == 2"):
        execute(new("x = 1", "assert 1 == 2, '1 == 2'"), tmp_path)


def test_metadata_of_a_machine_is_left_out(tmp_path: Path) -> None:
    notebook = new("1")
    notebook.metadata.language_info = {"name": "python", "version": "3.11.7"}
    notebook.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    normalise(notebook)
    write(notebook, tmp_path / "a.ipynb")
    written = (tmp_path / "a.ipynb").read_text()
    assert "3.11" not in written and "iopub" not in written
    assert read(tmp_path / "a.ipynb") == notebook


def test_an_unknown_name_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lesson", "nothing"]) == 2
    names = "attention, lesson, your_text"
    assert capsys.readouterr().err == f"there is no notebook 'nothing'; there are {names}\n"
