"""Standard output and error that cannot be written: no work is lost, and exit codes say it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gptfast import console
from gptfast.training.watching import progress

ROOT = Path(__file__).resolve().parents[1]
TEXT = "to be or not to be, that is the question\n" * 40
RUN = [
    *("train", "abc", "--model.n-layer", "1", "--model.n-head", "1", "--model.n-embd", "8"),
    *("--model.block-size", "8", "--train.batch-size", "4", "--train.steps", "6"),
    *("--train.eval-every", "2", "--train.sample", "to be"),
]


def gptfast(*arguments: str, redirected: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command by a shell, with its streams redirected."""
    words = [sys.executable, "-m", "gptfast", *arguments]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirected}', "bash", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run_into(out: Path, text: str, redirected: str) -> subprocess.CompletedProcess[str]:
    return gptfast(*RUN, "--data", text, "--out", str(out), redirected=redirected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_run_does_not_end_because_nobody_sees_it(tmp_path: Path, text: str) -> None:
    seen = run_into(tmp_path / "seen", text, "")
    assert seen.returncode == 0 and "a sample of step 6" in seen.stderr
    full = run_into(tmp_path / "full", text, "2>/dev/full")
    gone = run_into(tmp_path / "gone", text, "2> >(head -c 1 >/dev/null)")
    closed = run_into(tmp_path / "closed", text, ">&- 2>&-")
    assert full.returncode == gone.returncode == closed.returncode == 0
    histories = [
        [json.loads(line)["val_loss"] for line in (tmp_path / name / "history.jsonl").open()]
        for name in ("seen", "full", "gone", "closed")
    ]
    assert len(histories[0]) == 3 and all(each == histories[0] for each in histories)
    for name in ("full", "gone", "closed"):
        assert (tmp_path / name / "model.safetensors").exists()


@pytest.mark.parametrize("arguments", (("info",), ("--help",)))
def test_a_reader_that_has_gone_gives_the_documented_code(arguments: Sequence[str]) -> None:
    found = gptfast(*arguments, redirected="| true; exit ${PIPESTATUS[0]}")
    assert found.returncode == 141 and found.stderr == ""


def test_a_closed_standard_output_is_no_error() -> None:
    found = gptfast("info", redirected=">&-")
    assert found.returncode == 0 and found.stderr == ""


def test_a_bar_that_fails_once_shows_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = progress.TerminalBar(10, 0)
    bar.line("seen")
    calls: list[str] = []

    def fails(*args: Any, **options: Any) -> None:
        calls.append("print")
        raise OSError("no space left")

    monkeypatch.setattr(bar._console, "print", fails)
    for _ in range(2):
        bar.line("not seen")
    bar.update(3, "numbers")
    assert calls == ["print"]
    bar.stop()  # which prints once more: nobody sees that either


def test_what_is_said_without_a_stream_is_not_said_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.say("heard")
    monkeypatch.setattr(sys, "stderr", None)
    console.say("unheard")
    assert capsys.readouterr() == ("", "heard\n")
