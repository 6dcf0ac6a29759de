"""Peak memory of a training step, each contender in a separate process.

This is the increase of the peak resident memory from before the model is built to after three
steps. For a compiled model it includes the compilation inside the process.

`python memory.py MODULE ROW DTYPE CONTENDER THREADS` prints it in MiB.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from common import Row

import gptfast

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs, resets the peak (VmHWM) to the current VmRSS
STEPS = 3


def of_contenders(
    module: str, row: Row, names: list[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Measures contenders of a row, one process after the other.

    Args:
        module: The script that defines the row.
        row: A row whose `alone` builds the contenders.
        names: Names of the contenders.

    Returns:
        MiB by contender, and notes on contenders that could not be measured.
    """
    if not CLEAR_REFS.exists():
        return {}, {"memory": f"not measured: this system has no {CLEAR_REFS}"}
    found, notes = {}, {}
    environment = {**os.environ, "PYTHONPATH": str(Path(gptfast.__file__).parents[1])}
    for name in names:
        arguments = [module, row.name, row.dtype, name, str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
        )
        if done.returncode == 0:
            found[name] = float(done.stdout.split()[-1])
        else:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            notes[f"memory of {name}"] = f"not measured: {last}"
    return found, notes


def status_mib(name: str) -> float:
    """Returns a field of this process's status, such as VmRSS, in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.M)
    assert found is not None, f"{STATUS} has no {name}"
    return int(found[1]) / 1024


def main(module: str, name: str, dtype: str, contender: str, threads: str) -> None:
    """Measures one contender in this process and prints its MiB."""
    torch.set_num_threads(int(threads))
    rows = importlib.import_module(module).rows()
    row = next(row for row in rows if (row.name, row.dtype) == (name, dtype))
    CLEAR_REFS.write_text(RESET_PEAK)
    before = status_mib("VmRSS")
    step = row.alone[contender]()
    for _ in range(STEPS):
        step()
    print(status_mib("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
