"""Plots of runs: curves, files and errors."""

import json
import os
import subprocess
import sys

import pytest

from gptfast.errors import ConfigError, DataError
from gptfast.training import plots
from gptfast.training.plots import history_figure, plot_history, read_history
from gptfast.training.run import HISTORY_NAME

ROWS = [
    {"step": 10, "train_loss": 3.0, "val_loss": 2.5},
    {"step": 20, "train_loss": 2.0, "val_loss": 1.5},
    {"step": 40, "train_loss": 1.0, "val_loss": 1.2},
]
pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The curves of the last plot: label -> (x values, y values, colour)."""
    curves = {}
    draw = plots._draw

    def note(*arguments):
        figure = draw(*arguments)
        curves.clear()
        for line in figure.axes[0].lines:
            curves[line.get_label()] = (
                *([float(v) for v in values] for values in line.get_data()),
                line.get_color(),
            )
        return figure

    monkeypatch.setattr(plots, "_draw", note)
    return curves


def write_run(path, rows=ROWS):
    path.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (path / HISTORY_NAME).write_text(lines, encoding="utf-8")
    return path


def test_one_run_has_its_two_curves(tmp_path, drawn):
    plot_history(ROWS, tmp_path / "a.png")
    assert drawn["held-out"][:2] == ([10, 20, 40], [2.5, 1.5, 1.2])
    assert drawn["training"][:2] == ([5, 15, 30], [3.0, 2.0, 1.0])
    assert drawn["held-out"][2] != drawn["training"][2]


def test_runs_overlay_with_a_colour_each(tmp_path, drawn):
    one = write_run(tmp_path / "with")
    two = write_run(tmp_path / "without")
    plot_history([one, str(two / HISTORY_NAME)], tmp_path / "a.png")
    assert list(drawn) == ["with, held-out", "with, training", "without, held-out"] + [
        "without, training"
    ]
    colours = [colour for _, _, colour in drawn.values()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    plot_history({"A": ROWS, "B": one}, tmp_path / "a.png")
    assert list(drawn)[::2] == ["A, held-out", "B, held-out"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, drawn):
    (tmp_path / "x").mkdir()
    one, two = write_run(tmp_path / "run"), write_run(tmp_path / "x" / "run")
    plot_history([one, two], tmp_path / "a.png")
    assert list(drawn)[::2] == [f"{one}, held-out", f"{two}, held-out"]


def test_a_run_without_held_out_text_has_one_curve(tmp_path, drawn):
    plot_history([{**row, "val_loss": None} for row in ROWS], tmp_path / "a.png")
    assert list(drawn) == ["training"]


@pytest.mark.parametrize(
    "suffix, start", [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")]
)
def test_the_suffix_chooses_the_format(tmp_path, suffix, start):
    path = tmp_path / "new" / f"loss{suffix}"
    assert plot_history(ROWS, path, title="a title") == path
    assert path.read_bytes().startswith(start)


def test_a_history_comes_back_from_its_file(tmp_path):
    assert read_history(write_run(tmp_path / "run")) == ROWS
    assert read_history(tmp_path / "run" / HISTORY_NAME) == ROWS


def test_a_figure_has_the_curves_of_the_plot(tmp_path, drawn):
    figure = history_figure({"A": ROWS}, quantity="perplexity", title="a title")
    of_figure = dict(drawn)
    assert figure.axes[0].get_title(loc="left") == "a title"
    plot_history({"A": ROWS}, tmp_path / "a.png", quantity="perplexity")
    assert drawn == of_figure
    with pytest.raises(ConfigError, match="quantity must be one of loss, perplexity, lr, got 'x'"):
        history_figure(ROWS, quantity="x")


@pytest.mark.parametrize(
    "runs, name, error, message",
    [
        (ROWS, "a.txt", ConfigError, r"must end in \.png, \.svg, \.pdf"),
        ({}, "a.png", ConfigError, "1 to 7 runs, got 0"),
        ({str(i): ROWS for i in range(8)}, "a.png", ConfigError, "1 to 7 runs, got 8"),
        ([], "a.png", DataError, "the run: its history is empty"),
        ({"A": []}, "a.png", DataError, "A: its history is empty"),
        ("missing", "a.png", DataError, "missing: no such file"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, runs, name, error, message):
    with pytest.raises(error, match=message):
        plot_history(runs, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", '{"step": 1}', '{"step": "a", "train_loss": 1}'),
        *('{"step": 1, "train_loss": null}', '{"step": 1, "train_loss": [1, 2]}'),
        '{"step": 1, "train_loss": 1.5, "val_loss": "x"}',
    ],
)
def test_what_is_no_history_is_named_with_its_line(tmp_path, line):
    run = write_run(tmp_path / "run")
    with open(run / HISTORY_NAME, "a") as file:
        file.write(line)
    with pytest.raises(DataError, match="line 4 is not a row of a history"):
        read_history(run)


def test_an_unwritable_picture_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        plot_history(ROWS, tmp_path / "file" / "a.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'gptfast-kernels\[plot\]'"):
        plot_history(ROWS, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"pip install 'gptfast-kernels\[plot\]'"):
        history_figure(ROWS)


def test_importing_the_module_does_not_load_matplotlib():
    code = "import gptfast.training.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
