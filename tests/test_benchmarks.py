"""The benchmark scripts: what they print, when they fail, and the arithmetic of their numbers.

With --benchmark-enable, their quick rows are timed by pytest-benchmark, which can compare commits.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_attention
import bench_cross_entropy
import bench_ffn
import bench_generate
import bench_train
import command
import common
import loss_curves
import memory
import pytest
import report
import show
import time_to_loss
import torch
from common import OURS, Case, Row
from pytest_benchmark.fixture import BenchmarkFixture

from gptfast import ops
from gptfast.ops import select

if select.extension() is None:
    pytest.skip(f"{select.extension_error}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "attention": bench_attention,
    "ffn": bench_ffn,
    "cross_entropy": bench_cross_entropy,
    "train": bench_train,
    "generate": bench_generate,
}
PEERS = {"transformers", "CTranslate2", "llama.cpp"}  # packages that need not be installed
QUICK = [row for script in SCRIPTS.values() for row in script.rows() if row.quick]
CASES = {str(row): row.build() for row in QUICK}
for case in CASES.values():
    for compiles in case.compiles:
        del case.contenders[compiles]
TIMED = [(name, contender) for name, case in CASES.items() for contender in case.contenders]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Processes that run every script with --quick in parallel, and their output folder."""
    folder = tmp_path_factory.mktemp("results")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = {}
    for name in SCRIPTS:
        options = ["--quick", "--threads", "1", "--out", folder / f"{name}.json"]
        options += ["--plot", folder / f"{name}.png"]
        started[name] = subprocess.Popen(
            [sys.executable, ROOT / "benchmarks" / f"bench_{name}.py", *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield {"folder": folder, **started}
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes timing an error."""

    def fail(*_: Any) -> None:
        raise RuntimeError("something was timed")

    monkeypatch.setattr(command, "peak", fail)
    monkeypatch.setattr(command, "measure", fail)


@pytest.mark.parametrize(("name", "contender"), TIMED, ids=[" by ".join(pair) for pair in TIMED])
def test_quick_rows(benchmark: BenchmarkFixture, name: str, contender: str) -> None:
    case = CASES[name]
    if contender == OURS:
        assert case.verify().keys() <= PEERS
    benchmark.group = name
    benchmark(case.contenders[contender])


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_prints_table_and_json(processes: dict[str, Any], name: str) -> None:
    out, errors = processes[name].communicate(timeout=120)
    assert processes[name].returncode == 0, errors
    *table, last = out.splitlines()
    result = json.loads(last)
    assert result == json.loads((processes["folder"] / f"{name}.json").read_text())
    assert (processes["folder"] / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    card, extension = result["card"], select.extension()
    assert extension is not None and card["isa"] == extension.isa_current()
    levels = extension.isa_levels()
    assert {level for level, reason in levels.items() if reason is None} == {
        level for level, reason in card["levels"].items() if reason == "available"
    }
    assert card["threads"] == 1 and card["torch"] == torch.__version__
    expected = [row for row in SCRIPTS[name].rows() if row.quick]
    assert [(row["name"], row["dtype"]) for row in result["rows"]] == [
        (row.name, row.dtype) for row in expected
    ]
    assert result["failed"] == [] and result["peak"].keys() == common.DTYPES.keys()
    for row in result["rows"]:
        case = CASES[f"{row['name']}, {row['dtype']}"]
        assert row["ms"].keys() | row["notes"].keys() == case.contenders.keys()
        assert row["notes"].keys() <= PEERS  # how exact they are is not ours to test
        assert row["gflop"] == pytest.approx(1e-9 * case.flops)
        assert row["gflops"] == pytest.approx(1e3 * row["gflop"] / row["ms"][OURS])
        peak = result["peak"][row["dtype"]]["gflops"]
        assert row["of_peak"] == pytest.approx(row["gflops"] / peak)
        for contender, ratio in row["ratio"].items():
            assert ratio == pytest.approx(row["ms"][contender] / row["ms"][OURS])
            shown = f"{row['ms'][contender]:.3f} ({ratio:.2f}x)"
            assert any(line.startswith(row["name"]) and shown in line for line in table)
        assert row["rounds"] >= common.MIN_SLOW_ROUNDS


def wrong_by_a_thousandth(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: op(*args, **options) * 1.001


@pytest.mark.parametrize(
    ("script", "op"),
    (
        (bench_attention, "causal_attention"),
        (bench_attention, "layer_norm_attention"),
        (bench_ffn, "layer_norm_ffn"),
        (bench_cross_entropy, "linear_cross_entropy"),
        (bench_train, "linear_cross_entropy"),
    ),
)
def test_wrong_result_is_not_timed(
    script: ModuleType,
    op: str,
    monkeypatch: pytest.MonkeyPatch,
    no_timing: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "peak", lambda *_: {"gflops": 1.0, "by": "nobody", "size": "0"})
    monkeypatch.setattr(ops, op, wrong_by_a_thousandth(getattr(ops, op)))
    wrong = {"layer_norm_attention": "x + MHA", "causal_attention": "64 forward+backward"}
    only = ["--only", wrong[op]] if op in wrong else ["--only", "abc"]
    if script in (bench_ffn, bench_cross_entropy):
        only = ["--only", "+"]
    assert script.run(["--quick", "--dtype", "fp32", *only]) == 1
    out, errors = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["rows"] == [] and result["failed"]
    for row in result["failed"]:
        assert f"{row['name']}, fp32: FAILED" in errors and "error" in row["why"]
        assert f"{row['name']}, fp32: FAILED, not timed" in out


def test_right_results_beside_a_wrong_one_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "layer_norm_ffn", wrong_by_a_thousandth(ops.layer_norm_ffn))
    assert bench_ffn.run(["--quick", "--dtype", "fp32"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["GEMM 4096x512x128 forward"]
    assert [row["name"] for row in result["failed"]] == [
        "LN+FFN+residual 4096x128 forward+backward"
    ]


def test_no_mode_slows_what_is_timed() -> None:
    built: list[str] = []
    called: list[str] = []

    def contender() -> None:
        called.append(torch.empty(()).device.type)

    def build() -> Case:
        built.append(torch.empty(()).device.type)
        return Case({OURS: contender}, 1.0, dict)

    row = Row("row", "fp32", build, False, {})
    options = argparse.Namespace(device="meta", quick=False, seconds=0.01, memory=False)
    line = command.run_row(row, options, 1.0)
    assert set(built) == {"meta"}
    assert len(called) >= line["rounds"] and set(called) == {"cpu"}  # as a user calls it


def test_a_run_that_is_stopped_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, *_ = rows = [row for row in bench_attention.rows() if row.quick][:2]

    def run_first(row: Row, *_: Any) -> dict[str, Any]:
        if row is first:
            return {"name": row.name, "rounds": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "peak", lambda *_: {"gflops": 1.0, "by": "nobody", "size": "0"})
    monkeypatch.setattr(command, "run_row", run_first)
    out = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        command.main("attention", "", rows, ["--quick", "--out", str(out)])
    kept = json.loads(Path(f"{out}.partial").read_text())
    assert [row["name"] for row in kept["rows"]] == [first.name]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--dtype", "fp64"], "argument --dtype: invalid choice: 'fp64'"),
        (["--threads", "0"], "argument --threads: must be a positive number, got '0'"),
        (["--seconds", "nan"], "argument --seconds: must be a positive number, got 'nan'"),
        (["--only", "nothing"], "--only 'nothing' is in no row's name; there are 64x2x16x64"),
        (["--quick", "--only", "4096"], "--only '4096' names no row that --quick has"),
        (["--memory"], "unrecognized arguments: --memory"),
        (["--plot", "ratios.txt"], "--plot: the name must end in .png, .svg, .pdf"),
        (["--out", "/dev/null/x.json"], "cannot be written"),
        (["--out", "."], "cannot be written (Is a directory)"),
        (["--plot", "/dev/null/x.png"], "cannot be written"),
    ),
)
def test_mistakes_end_in_a_sentence_before_any_timing(
    options: list[str], message: str, no_timing: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_attention.run(options) == 2
    out, errors = capsys.readouterr()
    assert out == "" and message in errors
    assert errors.startswith("bench_attention: ") and len(errors.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(no_timing: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_attention.run(["--device", "cuda"]) == 2
    expected = "bench_attention: --device cuda: torch finds no CUDA device here\n"
    assert capsys.readouterr().err == expected


def test_an_unused_out_file_is_left_as_it_was(tmp_path: Path, no_timing: None) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("old")
    with pytest.raises(RuntimeError, match="something was timed"):
        bench_attention.run(["--out", str(new)])
    with pytest.raises(RuntimeError, match="something was timed"):
        bench_attention.run(["--out", str(old)])
    assert not new.exists() and old.read_text() == "old"


def test_compiled_contender(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "1024x128x5", "--dtype", "fp32", "--seconds", "0.1"]
    assert bench_cross_entropy.run(options) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    # Without a compiler, a note in the row reports it.
    assert ("torch.compile" in row["ms"]) != ("torch.compile" in row["notes"])


def test_rounds_take_turns_and_give_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    costs = {"a": [1.0, 9.0, 1.0, 1.0, 2.0, 1.0], "b": [3.0, 4.0, 3.0, 30.0, 5.0, 3.0]}

    def contender(name: str) -> Callable[[], None]:
        def run() -> None:
            now[0] += costs[name][calls.count(name)]
            calls.append(name)

        return run

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    timing = common.measure({name: contender(name) for name in costs}, seconds=20.0)
    # The first round is a warm-up and not counted.
    assert timing == common.Timing(5, {"a": 1.0, "b": 4.0})
    assert "".join(calls) == "ab" + "abbabaabab"


def test_every_order_of_three_is_timed() -> None:
    orders = ["".join(common.ordered("abc", round_)) for round_ in range(7)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac", "abc"]


@pytest.mark.parametrize(
    ("seconds", "one_round", "rounds"),
    ((3.0, 0.1, 30), (3.0, 1.0, 5), (3.0, 3.5, 3), (3.0, 1e-6, 1000)),
)
def test_number_of_rounds(seconds: float, one_round: float, rounds: int) -> None:
    assert common.count_rounds(seconds, one_round) == rounds


def test_other_work_is_no_comparison() -> None:
    x = torch.ones(3)
    contenders = {OURS: lambda: [x], "torch": lambda: [x], "other": lambda: [1.01 * x]}
    oracle = [x.double()]
    case = common.compare(contenders, lambda: oracle, 1.0, "fp32")
    wrong = "not timed: does other work: result 0 is not the same"
    assert common.drop_contenders_that_err(case) == {"other": wrong}
    assert list(case.contenders) == [OURS, "torch"] == [*contenders][:2]
    # The first that is right defines the budget.
    contenders = {OURS: lambda: [x], "other": contenders["other"], "torch": lambda: [x]}
    assert common.compare(contenders, lambda: oracle, 1.0, "fp32").verify().keys() == {"other"}
    del contenders["torch"]
    with pytest.raises(AssertionError, match="no other result is right"):
        common.compare(contenders, lambda: oracle, 1.0, "fp32").verify()


def test_contender_that_does_not_run_is_noted() -> None:
    def fail() -> None:
        raise NotImplementedError("not on this device\nand more")

    case = Case({OURS: lambda: None, "other": fail}, 1.0, dict)
    notes = command.drop_contenders_that_fail(case)
    assert notes == {"other": "does not run: NotImplementedError: not on this device"}
    assert list(case.contenders) == [OURS]
    with pytest.raises(AssertionError, match="gptfast does not run: NotImplementedError"):
        command.drop_contenders_that_fail(Case({OURS: fail}, 1.0, dict))


def test_a_course_that_is_wrong_leaves_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    results = bench_train.course_results
    twice = lambda *args: [2 * x for x in results(*args)]  # noqa: E731
    monkeypatch.setattr(bench_train, "course_results", twice)
    case = abc_row().build()
    wrong = "not timed: does other work: result 0 is not the same"
    assert common.drop_contenders_that_err(case) == {"course": wrong}
    assert list(case.contenders) == [OURS, "SDPA", bench_train.COMPILED]


def abc_row() -> Row:
    return next(row for row in bench_train.rows() if row.name == "abc")


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="there is no /proc here")
def test_memory_of_a_step() -> None:
    found, notes = memory.of_contenders("bench_train", abc_row(), [OURS, "nobody"])
    # 400,128 float32 weights with their gradients and AdamW's two moments take 6.1 MiB.
    assert found.keys() == {OURS} and 6 < found[OURS] < 400
    assert notes == {"memory of nobody": "not measured: KeyError: 'nobody'"}


def test_memory_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    found, notes = memory.of_contenders("bench_train", abc_row(), [OURS])
    assert found == {} and notes["memory"].startswith("not measured: this system has no")


def test_documents_have_the_results() -> None:
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_have_every_row_and_no_step_takes_more_memory_than_sdpa(name: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["dtype"]) for row in rows] == [
        (row.name, row.dtype) for row in SCRIPTS[name].rows()
    ]
    for row in rows:
        if mib := row.get("memory_mib"):
            assert mib[OURS] <= mib["SDPA"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=str)
def test_results_have_a_line_per_row(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    result = json.loads(text)
    assert text == show.to_text(result)
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    for row in result.get("rows") or result["runs"]:
        assert json.dumps(row) in lines


def write_result(folder: Path, **changes: Any) -> None:
    row = {"name": "abc", "dtype": "fp32", "rounds": 5, "gflop": 2.0, "gflops": 1000.0}
    row |= {
        "of_peak": 0.5,
        "best": "SDPA",
        "notes": {"other": "does not run: why"},
        "ms": {OURS: 2.0},
    }
    row |= {"ratio": {"SDPA": 1.5, "course": 2.25}, "memory_mib": {OURS: 100.4, "SDPA": 300.0}}
    card = {"cpu": "Some CPU", "threads": 2, "isa": "avx2", "torch": "2.13", "gptfast": "0.1.0"}
    card |= {"python": "3.11", "date": "2026-01-02", "levels": {"avx2": "available", "amx": "no"}}
    result = {"script": "train", "card": card, "peak": {"fp32": {}}, "rows": [row], "failed": []}
    folder.mkdir(exist_ok=True)
    (folder / "train.json").write_text(json.dumps(result | changes))


def documents(root: Path) -> list[str]:
    """Arguments for report.py with documents that contain only the markers."""
    (root / "docs").mkdir()
    for name in (report.README, report.PAGE):
        (root / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return ["--root", str(root), "--results", str(root / "results")]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = documents(tmp_path)
    readme, page, picture = (
        tmp_path / name for name in (report.README, report.PAGE, report.PICTURE)
    )
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.NOTHING in readme.read_text() and report.NOTHING in page.read_text()
    assert report.main([*arguments, "--check"]) == 0
    write_result(tmp_path / "results")
    assert report.main([*arguments, "--check"]) == 1
    names = f"{report.README} and {report.PAGE} and {report.PICTURE}"
    assert names in capsys.readouterr().err
    assert report.main(arguments) == 0 == report.main([*arguments, "--check"])
    for text in (readme.read_text(), page.read_text()):
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    text = page.read_text()
    assert "Some CPU, 2 threads, instruction set avx2 (no amx); torch 2.13" in text
    assert "|  | fp32, ms | x course fp32 | x best torch | of peak |" in text
    assert "| abc | 2.00 | 2.25 | 1.50 (SDPA) | 50% |" in text
    assert "\n- abc, fp32: other: does not run: why\n" in text
    assert "| abc, fp32 | 100 | 300 |" in text
    assert "|  | fp32 | x fastest other |" in readme.read_text()
    assert "| 2.00 ms | 1.50 (SDPA) |" in readme.read_text()
    assert "1.5 x SDPA" in picture.read_text()


def test_report_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = documents(tmp_path)
    (tmp_path / report.PAGE).write_text("no markers")
    assert report.main(arguments) == 2
    assert f"{report.PAGE} needs the lines" in capsys.readouterr().err
    write_result(tmp_path / "results", failed=[{"name": "abc", "dtype": "fp32", "why": "wrong"}])
    assert report.main(arguments) == 2
    assert "row 'abc' failed" in capsys.readouterr().err
    assert (tmp_path / report.PAGE).read_text() == "no markers"


def test_loss_curves_of_a_small_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out, picture = tmp_path / "text", tmp_path / "out.json", tmp_path / "out.png"
    text.write_text("so long lives this, and this gives life to thee\n" * 400)
    options = ["--data", text, "--steps", "4", "--seeds", "1", "2", "--out", out, "--plot", picture]
    code = loss_curves.main([str(option) for option in options])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text()) and picture.stat().st_size > 10_000
    assert code == (0 if result["within"] else 1)
    assert [(run["precision"], run["seed"]) for run in result["runs"]] == [
        ("fp32", 1), ("bf16", 1), ("fp32", 2), ("bf16", 2)
    ]  # fmt: skip
    assert all([step for step, _ in run["curve"]] == [1, 2, 3, 4] for run in result["runs"])
    assert "seed 2" in report.report([result])


@pytest.mark.parametrize(("bf16", "within"), ((1.005, True), (0.9, False), (1.02, False)))
def test_loss_curves_compare_with_another_seed(bf16: float, within: bool) -> None:
    engine = {"fp32": 1.0, "bf16": 1.001, "int8": 1.004}
    runs = [
        {"precision": "fp32", "seed": 1, "curve": [(5, 3.0), (10, 1.0)], "engine": engine},
        {"precision": "fp32", "seed": 2, "curve": [(5, 3.0), (10, 1.01)], "engine": engine},
        *({"precision": "bf16", "seed": seed, "curve": [(10, bf16)]} for seed in (1, 2)),
    ]
    result = loss_curves.compare(runs)
    assert result["within"] == within
    assert result["difference"] == pytest.approx(bf16 - 1.005)
    assert result["spread"] == pytest.approx(0.01)
    assert result["lost"] == pytest.approx({"bf16": 0.001, "int8": 0.004})
    engine["int8"] = 1.006
    assert not loss_curves.compare(runs)["within"]


@pytest.mark.parametrize(
    "options",
    (["--seeds", "1"], ["--data", "no such file"], ["--out", "/"], ["--plot", "curves.txt"]),
)
def test_loss_curves_say_what_is_wrong(options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert loss_curves.main(options) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) > 20


def test_time_to_loss_of_a_small_text(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "verify", lambda *_: {})  # tested by its own script
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text("so long lives this, and this gives life to thee\n" * 100)
    options = ["--data", text, "--steps", "4", "--every", "2", "--no-compile", "--dtype", "fp32"]
    options += ["--seconds", "0.01", "--threads", "1", "--out", out]
    assert time_to_loss.main([str(option) for option in options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    ours, theirs = result["runs"]
    assert (ours["name"], theirs["name"]) == (OURS, "SDPA")
    assert [step for step, *_ in ours["curve"]] == [2, 4]
    # The same weights, windows and schedule, so the same losses up to rounding.
    for (_, _, loss), (_, _, other) in zip(ours["curve"], theirs["curve"], strict=True):
        assert loss == pytest.approx(other, abs=1e-4)
    (epochs,) = result["epochs"]
    assert epochs["steps"] == 3 * -(-(int(int(4800 * 0.3) * 0.9) - 64) // 64)
    assert "Three epochs" in report.report([result])


def test_trainings_to_other_losses_are_no_comparison() -> None:
    ours = time_to_loss.summary(OURS, "fp32", [(50, 1.0, 1.95), (100, 2.0, 1.90)])
    assert (ours["steps"], ours["seconds"], ours["ms"], ours["loss"]) == (100, 2.0, 20.0, 1.90)
    near = time_to_loss.summary("SDPA", "fp32", [(50, 5.0, 1.955), (100, 9.0, 1.895)])
    assert time_to_loss.failures([ours, near]) == []
    for loss in (1.92, math.nan):
        far = time_to_loss.summary("SDPA", "fp32", [(50, 5.0, 1.95), (100, 9.0, loss)])
        (failure,) = time_to_loss.failures([ours, far])
        assert failure["name"] == "SDPA" and "at step 100" in failure["why"]


@pytest.mark.parametrize(
    "options",
    (["--threads", "0"], ["--steps", "0"], ["--data", "no such file"], ["--out", "/"]),
)
def test_time_to_loss_says_what_is_wrong(options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert time_to_loss.main(options) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) > 20
