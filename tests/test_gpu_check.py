"""gpu_check.py without a GPU: its driver, and its rows on a CUDA device that is not there."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_generate
import bench_train
import generation_peers
import pytest
import torch

pytest.importorskip("triton")
import fake_cuda  # noqa: E402
import gpu_check  # noqa: E402
from common import OURS, Row  # noqa: E402
from gpu import attention, compiling, loss, products, train  # noqa: E402
from gpu_check import Section  # noqa: E402

from gptfast.ops import triton as kernels  # noqa: E402

FACTS = {"script": "gpu_check"}
NUMBERS = {
    "dtype": "bf16", "ms": {OURS: 1.0, "SDPA": 2.0}, "best": "SDPA", "ratio": 2.0,
    "errors": {OURS: 1e-3}, "peak_mib": {OURS: 7.0}, "notes": {"SDPA cuDNN": "does not run"},
    "tflops": 400.0,
}  # fmt: skip


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Returns a function that runs a section whose process is a script, and returns the report."""

    def run(script: str, seconds: float = 60.0) -> dict[str, Any]:
        place, out = tmp_path / "section.py", tmp_path / "result.json"
        begin = "import sys, time\nROW = 'ROW '\nprint('imported', flush=True)\n"
        place.write_text(begin + script)
        monkeypatch.setattr(gpu_check, "__file__", str(place))
        options = gpu_check.parse(["--out", str(out)])
        report = gpu_check.Report(out, dict(FACTS))
        report.write()
        waiting = gpu_check.Waiting(Section("attention", seconds), options)
        gpu_check.run_section(waiting, options, report)
        return json.loads(out.read_text())

    return run


def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main([]) == gpu_check.EXIT_BAD_INPUT
    message = "gpu_check: torch finds no CUDA device here, and the check needs one\n"
    assert capsys.readouterr().err == message


def test_the_package_need_not_be_installed(tmp_path: Path) -> None:
    """The script is found with the package beside it, and not by what an installation added."""
    script = f"""
import runpy, sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in str(each).lower()]
sys.path = [each for each in sys.path if each and not each.startswith({str(gpu_check.ROOT)!r})]
sys.path.insert(0, {str(Path(gpu_check.__file__).parent)!r})  # as Python does for a script
runpy.run_path({gpu_check.__file__!r})
import gptfast
print(gptfast.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(ran.stdout.strip()) == gpu_check.ROOT / "gptfast" / "__init__.py", ran.stderr


def test_options_that_do_not_exist() -> None:
    for options in (["--only", "everything"], ["--sections"], ["--workers", "none"]):
        with pytest.raises(SystemExit) as error:
            gpu_check.main(options)
        assert error.value.code == gpu_check.EXIT_BAD_INPUT


def test_rows_are_written_as_they_come(
    section: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = json.dumps({"name": "one", **NUMBERS})
    script = f"""
print("noise")
print(ROW + {row!r}, flush=True)
deadline = time.monotonic() + 30
while '"one"' not in open({str(tmp_path / "result.json")!r}).read():  # before this process ends
    assert time.monotonic() < deadline
    time.sleep(0.01)
print(ROW + '{{"name": "two", "dtype": "bf16", "failed": "gradient 1: error 1 > 0.1"}}')
"""
    result = section(script)
    assert [each["name"] for each in result["rows"]] == ["one", "two"]
    assert result["failed"] == ["attention: two: gradient 1: error 1 > 0.1"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "attention  one, bf16: 1 ms, 400 TFLOP/s, 2.00 x SDPA (2 ms), 7 MiB, error 1.0e-03"
        "; SDPA cuDNN: does not run",
        "attention  two, bf16: FAILED: gradient 1: error 1 > 0.1",
    ]


def test_a_section_that_hangs_is_stopped_and_its_rows_remain(section: Any) -> None:
    row = json.dumps({"name": "one", **NUMBERS})
    result = section(f"print(ROW + {row!r}, flush=True)\ntime.sleep(60)", seconds=2.0)
    assert [each["name"] for each in result["rows"]] == ["one"]
    assert result["failed"] == ["attention: not finished after 2 seconds"]


def test_a_section_that_crashes_says_its_last_words(section: Any) -> None:
    result = section("raise RuntimeError('an illegal memory access')")
    (failed,) = result["failed"]
    assert failed == "attention: ended with exit code 1: RuntimeError: an illegal memory access"


@pytest.mark.parametrize("fails", (False, True))
def test_exit_code_says_whether_something_failed(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_section(waiting: Any, options: Any, report: gpu_check.Report) -> None:
        ran.append(waiting.section.name)
        if fails and waiting.section.name == "loss":
            report.fail("loss", "it broke")

    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "facts", lambda: dict(FACTS))
    monkeypatch.setattr(gpu_check, "compile_all", lambda chosen, *_: ran.append(str(len(chosen))))
    monkeypatch.setattr(gpu_check, "Waiting", lambda each, _: SimpleNamespace(section=each))
    monkeypatch.setattr(gpu_check, "run_section", run_section)
    options = ["--only", "loss", "train", "--out", str(tmp_path / "new" / "result.json")]
    assert gpu_check.main(options) == (gpu_check.EXIT_FAILED if fails else 0)
    assert ran == ["2", "ceilings", "train", "loss"]  # the order of the table, not of the options
    failed = json.loads((tmp_path / "new" / "result.json").read_text())["failed"]
    assert failed == (["loss: it broke"] if fails else [])


def test_a_kernel_that_does_not_compile_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "gpu_check.py"
    script.write_text("print('norm_kernel: failed: out of registers'); print('compiled 3')")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    report = gpu_check.Report(tmp_path / "result.json", dict(FACTS))
    chosen = [each for each in gpu_check.SECTIONS if each.name == "loss"]
    gpu_check.compile_all(chosen, gpu_check.parse(["--workers", "1"]), report)
    failed = json.loads((tmp_path / "result.json").read_text())["failed"]
    assert failed == ["compiling: norm_kernel: failed: out of registers"]


def test_all_limits_together_fit_into_four_minutes() -> None:
    sections = gpu_check.COMPILING, gpu_check.CEILINGS, *gpu_check.SECTIONS
    assert sum(each.seconds for each in sections) <= gpu_check.SECONDS < 240.0
    assert gpu_check.COMPILING.seconds < 60.0


def test_what_pytest_says_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        "[gw0] [  1%] PASSED tests/test_triton.py::test_a[cuda-BM: 64, BN: 32] ",
        "tests/test_triton.py::test_b[cuda] FAILED    [ 50%]",
        "[gw1] [ 99%] SKIPPED tests/test_triton.py::test_c[cuda] ",
        "FAILED tests/test_triton.py::test_b[cuda] - AssertionError: result: error 1 > 0.1",
    ]
    command = [sys.executable, "-c", f"print('\\n'.join({said!r})); raise SystemExit(1)"]
    monkeypatch.setattr(gpu_check, "pytest_command", lambda full: command)
    report = gpu_check.Report(tmp_path / "result.json", dict(FACTS))
    gpu_check.run_tests(gpu_check.parse([]), report)
    (row,) = report.found["rows"]
    assert row["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert row["failed"] == "1 tests, 1 passed"
    assert row["failures"] == said[-1:]


S = replace(bench_generate.S, n_layer=1)
ROWS: list[Row] = [
    next(row for row in module.rows(False) if part in row.name)
    for module, part in (
        (attention, "x64 forward+backward, dropout"),
        (products, "layer norm linear 16384x768x2304 forward+backward"),
        (products, "linear residual"),
        (products, "FFN"),
        (loss, ""),
    )
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows_keep_to_the_device(row: Row) -> None:
    with fake_cuda.on_fake_cuda(kernels.KERNELS):
        with torch.device(fake_cuda.DEVICE):
            case = row.build()
        for name, contender in case.contenders.items():
            if name not in case.compiles:
                contender()


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_training_keeps_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(train.SHAPES[0].model, n_layer=1)
    shape = replace(train.SHAPES[0], model=model, batch=2)
    with pytest.raises(AssertionError, match="without a CUDA graph: the model is on device 'cpu'"):
        train.verify_graph(shape, "fp32")
    monkeypatch.setattr(train, "verify_graph", lambda *_: None)  # which needs a device
    with fake_cuda.on_fake_cuda(kernels.KERNELS):
        with torch.device(fake_cuda.DEVICE):
            train.case(shape, "bf16").verify()
            makers = bench_train.makers(shape, "bf16")
            steps = [makers[name]() for name in (OURS, "SDPA", "course fp32")]
        for step in steps:
            with pytest.raises(pytest.skip.Exception, match="no graph"):  # after the forward
                step()


@pytest.mark.parametrize("past", (False, True))
def test_peers_of_generation_keep_to_the_device(
    past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = bench_generate.Shape("S", S, 64 if past else 4, 3, 2, past)
    monkeypatch.setattr(generation_peers, "captured", lambda step: lambda: step)
    bench_generate.model_of.cache_clear()
    with fake_cuda.on_fake_cuda(kernels.KERNELS):
        with torch.device(fake_cuda.DEVICE):
            makers = bench_generate.makers(shape, "bf16")
            others = [name for name in makers if name not in (OURS, "transformers")]
            contenders = {name: makers[name]() for name in others}
        for contender in contenders.values():
            assert [len(row) for row in contender()] == [3, 3]
    bench_generate.model_of.cache_clear()
    assert (bench_generate.CAPTURED in contenders) == (not past)


def test_a_kernel_is_compiled_by_the_process_that_claims_it(tmp_path: Path) -> None:
    claims = compiling.Claims(tmp_path)
    claimed = claims.claim("kernel BM=64")
    assert claimed is not None and claims.claim("kernel BM=64") is None
    assert claims.claim("kernel BM=128") is not None
    for path in tmp_path.glob("*.claimed"):
        path.rename(path.with_suffix(".done"))
    claims.wait()  # returns
    assert claims.claim("kernel BM=64") is None


def test_nothing_is_captured_while_threads_compile(tmp_path: Path) -> None:
    called, before = [], torch.cuda.CUDAGraph
    with compiling.compiling(compiling.Claims(tmp_path)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            called.append(1)
        graph.replay()
    assert called == [1] and torch.cuda.CUDAGraph is before


def test_a_call_without_launches_that_does_not_end_is_ended() -> None:
    with pytest.raises(compiling.Enough), compiling.at_most(1):
        while True:
            time.sleep(0.01)
