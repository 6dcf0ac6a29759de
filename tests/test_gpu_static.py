"""Compilation of the Triton kernels without a GPU: the script and its table."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import gpu_static as script  # noqa: E402
from gpu_cases import DTYPES, cases  # noqa: E402

from gptfast.ops import triton as kernels  # noqa: E402
from gptfast.ops.triton import launch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "gpu_static.json"


def gpu_static(*options: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with Triton's compiler; the process of the tests uses the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_static.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def compiled(*calls: str, chip: str = "sm_80", check: str = "") -> list[int]:
    """Returns how many kernels have been compiled for a chip after each of these calls.

    Args:
        calls: Python code.
        chip: One of gpu_static.CHIPS.
        check: Is run for each kernel's `name` and `ptx`, indented by 4.
    """
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import numpy, torch
from gpu_cases import empty, long
from gpu_static import CHIPS, compiling_for
from gptfast.ops.triton import attention, attention_backward, decode, embedding, ffn, linear
from gptfast.ops.triton import self_attention
from gptfast.ops.triton.cross_entropy import linear_cross_entropy
from gptfast.ops.triton.decode import fill_cache, next_windows
from gptfast.ops.int8 import empty_int8
from gptfast.ops.triton.few_rows import Append, Embedding, few_rows_linear
from gptfast.ops.triton.int8 import round_to_int8
from gptfast.ops.triton.sampling import Progress, kind_of, sample
from gptfast.ops.triton.slots import start_slots
from gptfast.ops.sampling import Sampling

def layer(M, K, N):
    linear.linear(empty(M, K), empty(K), empty(K), empty(N, K), empty(N), empty(M, N))
    args = empty(M, N), empty(M, K), empty(K), empty(K), empty(M), empty(M), empty(N, K), empty(N)
    linear.linear_backward(*args, 0b11111)

def heads(B, T, H, D):
    q, out = empty(B, H, T, D), empty(B, T, H, D)
    attention.attention(q, q, q, 0.3, 0.1, long(), 2**32 - 1)
    attention_backward.attention_backward(
        out, q, q, q, out, empty(B, H, 2, T), 0.3, 0.1, long(), 1
    )

def attention_block(B, T, C, H):
    x, out = empty(B, T, C), empty(B, T, C)
    params = empty(C), empty(C), empty(3 * C, C), empty(3 * C), empty(C, C), empty(C)
    self_attention.self_attention(x, *params, H, 0.0, 0, 0.1, long(), 1, True)
    kept = empty(B * T), empty(B * T), empty(B, T, 3 * C), out, empty(B, H, 2, T)
    self_attention.self_attention_backward(x, x, *params, *kept, H, 0.0, 0, 0.1, long(), 1, 127)

def block(M, C, F):
    x, params = empty(M, C), (empty(C), empty(C), empty(F, C), empty(F), empty(C, F), empty(C))
    ffn.ffn(x, *params, "erf", 0.1, long(), 2, True)
    kept = empty(M), empty(M), empty(M, F)
    ffn.ffn_backward(x, x, *params, *kept, "erf", 0.1, long(), 2, 0b1111111)

def loss(M, K, V, smoothing=0.0):
    args = empty(M, K), empty(K), empty(K), empty(V, K), long(M), None, 1, "mean", smoothing, 0b1111
    linear_cross_entropy(*args)

def tables(B, T, V, C):
    idx, wte, wpe = long(B, T), empty(V, C), empty(T, C)
    embedding.embedding(idx, wte, wpe, 0.1, long(), 0, torch.float32)
    embedding.embedding_backward(empty(B, T, C), idx, wte, wpe, 1, 0.1, long(), 0, 0b11)

def decoded(R, H, capacity, D):
    decode.decode_attention(empty(R, H * D), empty(R, 2, H, capacity, D), long(R))

def drawn(R, V, **how):
    numbers, seen, each = empty(5, dtype=torch.float64), empty(R, V, dtype=torch.uint8), long(R)
    progress = Progress(each, each, each, each, each, long(R, V), V)
    kind = kind_of(Sampling(**how), V)
    drawn = each, each, each, each, empty(R), progress
    sample(kind, numbers, empty(R, V), V, seen, *drawn)

def few_rows(M, K, N):
    x, w, b, y = empty(M, K), empty(N, K), empty(N), empty(M, N)
    few_rows_linear(x, w, b, y, norm=(b, b), gelu="erf", residual=y)
    each, tables = long(M), (empty(N, K), empty(N, K))
    append = Append(empty(M, 2, 1, N, K), each, each, each)
    embedding = Embedding(each, each, *tables, N)
    few_rows_linear(x, empty(3 * K, K), None, x, norm=(b, None), embedding=embedding, append=append)
    round_to_int8(w, empty_int8(w))
    few_rows_linear(x, empty_int8(w), None, y)
    next_windows(each, each, each, each, each, long(M, N), N, N, 1)
    fill_cache(empty(M, N, 2 * K), each, each, append.cache)
    start_slots(long(8 * M), M, long(7, M), long(M, N), None)

with compiling_for(CHIPS[{chip!r}]) as found:
    for call in {calls!r}:
        exec(call)
        print(len(found))
for _, function, kernel in found:
    name, ptx = function.__name__, kernel.asm["ptx"]
    {check}
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return [int(line) for line in process.stdout.splitlines()[-len(calls) :]]


def test_sizes_of_one_compile() -> None:  # the compiler treats an argument of 1 as a constant
    layers = "layer(1, 1, 1); heads(1, 1, 1, 1); attention_block(1, 1, 1, 1); block(1, 1, 1)"
    ends = "loss(1, 1, 1); loss(1, 1, 1, 0.1); tables(1, 1, 1, 1)"
    decoding = "decoded(1, 1, 1, 1); drawn(1, 1, top_k=1, top_p=1, min_p=1); few_rows(1, 1, 1)"
    assert compiled(f"{layers}; {ends}; {decoding}") > [0]


def test_sampling_options_may_be_numbers_of_any_type() -> None:
    options = "top_k=2**70, temperature=numpy.float32(0.5), top_p=numpy.float32(0.5)"
    assert compiled(f"drawn(2, 9, {options}, repetition_penalty=2)") == [1]


def test_a_kernel_is_the_same_for_every_number_of_rows() -> None:
    calls = (
        "linear.linear(empty({0}, 32), empty(32), None, empty(48, 32), None, empty({0}, 48))",
        "ffn.ffn(empty({0}, 32), *weights, 'erf', 0.1, long(), 2, True)",
        "embedding.embedding(long({0}, 3), wte, wpe, 0.1, long(), 0, torch.float32)",
    )
    given = (
        "weights = empty(32), None, empty(64, 32), None, empty(32, 64), None;"
        "wte, wpe = empty(9, 32), empty(3, 32)"
    )
    some = ["; ".join(calls).format(rows) for rows in (1, 64, 600)]
    _, one, *more = compiled(given, *some)
    assert 0 < one == more[0] == more[1]


def test_kernels_that_start_early_wait_before_they_write() -> None:
    calls = "decoded({0}, 1, 300, 16); drawn({0}, 2000, temperature=0.0); few_rows({0}, 64, 64)"
    of_a_step = "norm", "few_rows", "part", "join", "highest", "sample"
    check = f"""
    if name.removesuffix("_kernel") not in {of_a_step}:
        continue
    before, after = ptx.split("griddepcontrol.wait")
    assert "st.global" not in before and "st.global" in after and kernel.metadata.launch_pdl
    assert ("launch_dependents" in before) == {{0}}, "the next one starts {{1}}"
    """
    compiled(calls.format(1), chip="sm_90", check=check.format(True, "at once"))
    compiled(calls.format(64), chip="sm_90", check=check.format(False, "at the end"))
    compiled(calls.format(1), check="assert 'griddepcontrol' not in ptx")


def test_kernels_of_a_training_step_compile_for_every_chip() -> None:
    cases = "attention, D 64, dropout", "attention backward, D 64, dropout", "linear and"
    process = gpu_static("--dtype", "bf16", "--only", *cases)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].endswith("compiled, 0 fail")


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_cdna() -> None:
    process = gpu_static("--chip", "sm_80", "gfx942", "--dtype", "bf16")
    assert process.returncode == 0, process.stderr


def test_every_kernel_has_a_case() -> None:
    run: set[str] = set()

    def note(kernel: launch.Kernel, _: launch.Args) -> bool:
        run.add(kernel.name)
        return False

    with launch.watched(note):
        for case in cases():
            for dtype in case.dtypes:
                case.run(DTYPES[dtype])
    files = pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
    modules = [vars(importlib.import_module(each.name)).values() for each in files]
    every = {x.name for module in modules for x in module if isinstance(x, launch.Kernel)}
    assert every == run


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
def test_mistakes_in_the_options(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(options) == 2 and message in capsys.readouterr().err
