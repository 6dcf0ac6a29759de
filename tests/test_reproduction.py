"""The course's exercises trained again: runs, report, pictures, and how it goes on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gptfast import checkpoint, cli
from gptfast.errors import ConfigError
from gptfast.reproduction import EXERCISES, Reproduction, Trained, reproduce, runs
from gptfast.training.run import HISTORY_NAME

pytest.importorskip("matplotlib")

TEXT = "MARCIUS: to be or not to be, that is the question:\nwhether 'tis nobler\n" * 8
TINY = {"n_embd": 8, "n_layer": 1, "block_size": 8, "text_fraction": 1.0, "progress": False}
NAMES = [exercise.preset for exercise in EXERCISES]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "CHARACTERS", 30)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reproduction, Path]:
    """A reproduction with two seeds."""
    out = tmp_path_factory.mktemp("reproduction")
    before, runs.CHARACTERS = runs.CHARACTERS, 30
    try:
        return reproduce(out, seeds=2, text=TEXT, **TINY), out
    finally:
        runs.CHARACTERS = before


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / HISTORY_NAME).read_text().splitlines()]


def test_each_exercise_is_trained_by_each_seed(done):
    found, out = done
    assert list(found.runs) == NAMES
    for name in NAMES:
        for seed, run in enumerate(found.runs[name]):
            folders = (out / f"{name}{kind}-seed{seed}" for kind in ("", "-reference"))
            [folder] = filter(Path.exists, folders)
            rows = history(folder)
            assert run.losses == [(row["train_loss"], row["val_loss"]) for row in rows]
            header = checkpoint.read_config(folder)
            assert header["extra"]["train"]["seed"] == run.seed == seed
            assert header["config"]["attention"] == (name == "shakespeare")
            assert run.sample.startswith("MARCIUS: ") and len(run.sample) == 9 + 30
    first, second = found.runs["shakespeare"]
    assert first.losses != second.losses and first.sample != second.sample


def test_the_report_has_both_tables_all_samples_and_pictures(done):
    found, out = done
    report = found.report.read_text(encoding="utf-8")
    for numbers in ("1.7662 / 1.7427", "1.4726 / 1.6800", "2.4290 / 2.5480"):
        assert numbers in report
    for name in NAMES:
        for run in found.runs[name]:
            train, held_out = run.losses[-1]
            assert f"| {train:.4f} / {held_out:.4f} |" in report
            assert f"~~~text\n{run.sample}\n~~~" in report
    means = [sum(run.losses[2][part] for run in found.runs["shakespeare"]) / 2 for part in (0, 1)]
    assert f"{means[0]:.4f} / {means[1]:.4f}" in report
    assert found.difference == pytest.approx(means[1] - 1.6940) and not found.agrees
    assert "more than the 0.03 that were allowed" in report
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"


def test_finished_runs_are_kept_and_interrupted_ones_go_on(tmp_path, monkeypatch):
    train, calls = runs.train, []

    def second_is_interrupted(chosen, folder, **options):
        calls.append((chosen.name, options["resume"]))
        result = train(chosen, folder, **options)
        return replace(result, interrupted=True, signal=15) if len(calls) == 2 else result

    monkeypatch.setattr(runs, "train", second_is_interrupted)
    options = {"seeds": 1, "text": TEXT, "epochs": 1, **TINY}
    found = reproduce(tmp_path, **options)
    assert (found.report, found.signal) == (None, 15)
    assert not (tmp_path / "report.md").exists()
    before = {folder: history(folder) for folder in tmp_path.glob("*-seed0")}
    found = reproduce(tmp_path, **options)
    assert found.report == tmp_path / "report.md"
    assert calls == [(NAMES[0], False), (NAMES[1], False), (NAMES[0], True), (NAMES[1], True)]
    assert {folder: history(folder) for folder in before} == before
    assert "The runs have 1 evaluations, the course's 3" in found.report.read_text()
    reproduce(tmp_path, **options, backend="reference")
    folders = {folder.name for folder in tmp_path.glob("shakespeare-reference-*")}
    assert folders == {"shakespeare-reference-seed0"}


def test_a_mean_near_the_courses_agrees():
    def run(*held_out: float) -> list[Trained]:
        return [Trained(i, [(1.0, loss)], 1.0, 1.0, "") for i, loss in enumerate(held_out)]

    assert Reproduction({"shakespeare": run(1.60, 1.72, 1.72)}, None).agrees
    assert not Reproduction({"shakespeare": run(1.65, 1.65)}, None).agrees


def test_what_is_wrong_is_said_before_any_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    with pytest.raises(ConfigError, match="seeds must be a whole number from 1"):
        reproduce(tmp_path, seeds=0)
    (tmp_path / "text").write_text("to be")
    options = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "runs")]
    assert cli.main(["reproduce", *options]) == 2
    assert "text is not the corpus 'shakespeare'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("loss", "code"), [(1.69, 0), (1.75, 1)])
def test_the_exit_code_says_whether_the_loss_is_the_courses(capsys, monkeypatch, loss, code):
    found = Reproduction({"shakespeare": [Trained(0, [(1.5, loss)], 1.0, 1.0, "")]}, Path("r.md"))
    given = {}
    monkeypatch.setattr("gptfast.reproduction.reproduce", lambda out, **o: given.update(o) or found)
    assert cli.main(["reproduce", "--seeds", "2", "--backend", "reference"]) == code
    assert (given["seeds"], given["backend"]) == (2, "reference")
    assert capsys.readouterr().out == "the report is in r.md\n"
    monkeypatch.setattr(
        "gptfast.reproduction.reproduce", lambda *_, **__: replace(found, report=None, signal=2)
    )
    assert cli.main(["reproduce"]) == 130


def test_several_processes_are_refused(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match="reproduce runs in one process, torchrun has started"):
        reproduce(tmp_path / "r", text=TEXT, **TINY)
    assert not (tmp_path / "r").exists()
