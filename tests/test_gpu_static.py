"""What the Triton kernels compile to for GPUs that are not here: the script, and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "gpu_static.json"


def gpu_static(*options: str) -> subprocess.CompletedProcess[str]:
    """Runs the script where Triton compiles, which the tests' own process has it not do."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_static.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("chip", ("sm_80", "sm_90", "sm_100", "gfx942"))
def test_kernels_of_a_training_step_compile(chip: str) -> None:
    for case in ("attention, D 64, dropout", "attention backward, D 64, dropout", "linear and"):
        process = gpu_static("--chip", chip, "--dtype", "bf16", "--only", case)
        assert process.returncode == 0, process.stderr
        assert process.stdout.splitlines()[-1].endswith("compiled, 0 fail")


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_cdna() -> None:
    process = gpu_static("--chip", "sm_80", "gfx942", "--dtype", "bf16")
    assert process.returncode == 0, process.stderr


def test_the_table_has_every_chip_and_no_failure() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {row["chip"] for row in table["rows"]} == set(table["chips"])
    assert not [row for row in table["rows"] if row["fails"]]
    for row in table["rows"]:
        assert row["best_us"] > 0 and row["shared"] <= table["chips"][row["chip"]]["shared"]


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--only", "nothing"], "--only: no case has 'nothing' in its name"),
        (["--out", f"{TABLE}/below-a-file.json"], "cannot be written"),
    ),
)
def test_mistakes_in_the_options(options: list[str], message: str) -> None:
    process = gpu_static(*options)
    assert process.returncode == 2 and message in process.stderr
