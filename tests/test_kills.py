"""Runs that are killed while they train and save; `make test-kill` does it a hundred times."""

import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("there is no kill -9", allow_module_level=True)
from kill_runs import kill_runs  # noqa: E402


def test_a_killed_run_goes_on_to_the_bits_it_would_have_had(tmp_path: Path) -> None:
    outcome = kill_runs(5, seed=0, folder=tmp_path)
    assert not outcome.wrong
    assert outcome.kills == 5 and outcome.ended >= 1
