"""Compiles the Triton kernels for GPUs without a GPU: resources, instructions, best times.

Every operator is called on tensors without data, and its kernels are compiled instead of launched,
in the configuration that a chip takes and with every tile of a product. A kernel fails if it spills
registers, needs more shared memory than the chip has, multiplies matrices without matrix
instructions, or has no 16-byte load in any configuration. The best time is that of the useful FLOPs
or of the least bytes at the chip's published peaks, whichever is longer. Exit code 1: a kernel
fails; 2: invalid options.
"""

import argparse
import contextlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import command
import show
import torch
import triton
from gpu_cases import DTYPES, cases
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from gptfast.errors import ConfigError
from gptfast.ops.triton import launch, products


@dataclass(frozen=True)
class Chip:
    """The limits of a GPU that its maker publishes."""

    name: str
    target: GPUTarget
    shared: int  # bytes of shared memory per block
    matrix: float  # dense TFLOP/s in bfloat16 and float16
    vector: float  # TFLOP/s in float32, without tf32
    bandwidth: float  # memory bandwidth, GB/s


CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", GPUTarget("cuda", 80, 32), 166912, 312.0, 19.5, 2039.0),
    "sm_89": Chip("RTX 4090", GPUTarget("cuda", 89, 32), 101376, 165.0, 82.6, 1008.0),
    "sm_90": Chip("H100 SXM", GPUTarget("cuda", 90, 32), 232448, 989.0, 67.0, 3350.0),
    "sm_100": Chip("B200", GPUTarget("cuda", 100, 32), 232448, 2250.0, 75.0, 8000.0),
    "gfx942": Chip("MI300X", GPUTarget("hip", "gfx942", 64), 65536, 1307.0, 163.0, 5300.0),
}
MATRIX = {"cuda": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", "hip": r"v_mfma"}
WIDE_LOAD = {
    "cuda": r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg\.shared\.global"
    r"|cp\.async\.bulk\.tensor",
    "hip": r"(global|buffer)_load_dwordx4",
}
PRODUCTS = (
    "forward_kernel", "query_grad_kernel", "key_grads_kernel", "linear_kernel",
    "hidden_grad_kernel", "one_hot_kernel", "few_rows_kernel",
)  # fmt: skip
SMALL = ("join_kernel", "window_kernel", "start_kernel")  # they read a few numbers per thread


@dataclass(frozen=True)
class Compiled:
    """A kernel in one configuration, for one chip."""

    kernel: str
    config: str
    shared: int  # bytes
    registers: int
    spills: int  # spilled registers (HIP) or bytes of stack and local memory (CUDA)
    matrix: bool  # whether it has matrix instructions
    wide: bool  # whether it has 16-byte loads


class NoDevice:
    """A stand-in for a GPU's driver, with what Triton needs for compilation."""

    def __init__(self, chip: Chip) -> None:
        self._target = chip.target

    def get_current_target(self) -> GPUTarget:
        """Returns the target of the compilation."""
        return self._target

    def get_current_device(self) -> str:
        """Returns a key for Triton's cache."""
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        """Returns a dummy: nothing is launched."""
        return 0


@contextlib.contextmanager
def compiling_for(chip: Chip) -> Iterator[list[tuple[str, Any, Any]]]:
    """Compiles kernels instead of launching them; yields a growing list of the results."""
    found: list[tuple[str, Any, Any]] = []
    limit = launch.shared_limit

    def compile_all(kernel: launch.Kernel, args: launch.Args) -> bool:
        names = ("BM", "BN", "BK", "BLOCK", "ROWS", "PART", "num_warps", "num_stages")
        whole = {**args, **kernel.chosen(args)}
        compiled = kernel.function.run(grid=None, warmup=True, **whole)
        config = ", ".join(f"{name} {whole[name]}" for name in names if name in whole)
        if compiled.hash not in {each.hash for _, _, each in found}:
            found.append((config, kernel.function, compiled))
        return False

    triton.runtime.driver.set_active(NoDevice(chip))
    launch.shared_limit = lambda: chip.shared
    try:
        with launch.watched(compile_all):
            yield found
    finally:
        launch.shared_limit = limit


def with_every_tile() -> Iterator[None]:
    """Makes products use one tile after the other, whatever is multiplied."""
    tables: Any = products.DESCRIBED_TILES, *products.POINTER_TILES.values()
    choose: Any = products.choose_tile

    def always(i: int) -> Any:
        def one(tiles: Any, M: int, N: int, itemsize: int, processors: int, shared: int) -> Any:
            fit = products.fitting(tiles, itemsize, shared)
            return fit[min(i, len(fit) - 1)]

        return one

    try:
        for i in range(max(map(len, tables))):
            products.choose_tile = always(i)
            yield
    finally:
        products.choose_tile = choose


def examine(config: str, kernel: Any, compiled: Any) -> Compiled:
    """Collects a kernel's resources from the compiler and its instructions from the assembly."""
    backend = compiled.metadata.target.backend
    text = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    registers, spills = (_cuda_resources if backend == "cuda" else _hip_resources)(compiled)
    return Compiled(
        kernel.__name__,
        config,
        compiled.metadata.shared,
        registers,
        spills,
        bool(re.search(MATRIX[backend], text)),
        bool(re.search(WIDE_LOAD[backend], text)),
    )


def _cuda_resources(compiled: Any) -> tuple[int, int]:
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    names = "REG", "STACK", "LOCAL"
    registers, stack, local = (_number(rf"{name}:(\d+)", said) for name in names)
    return registers, stack + local


def _hip_resources(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    # Spills of scalar registers do not count: they go to vector registers, not to memory.
    names = "vgpr_count", "vgpr_spill_count"
    registers, spills = (_number(rf"\.{name}: +(\d+)", text) for name in names)
    return registers, spills


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the compiler does not say {pattern}"
    return int(found[1])


def compile_case(arch: str, name: str, dtype: str) -> list[dict[str, Any]]:
    """Returns the rows of one case, one per kernel and configuration."""
    chip, (case,) = CHIPS[arch], [case for case in cases() if case.name == name]
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    with compiling_for(chip) as found:
        for _ in with_every_tile():
            case.run(DTYPES[dtype])
    size = case.elements * DTYPES[dtype].itemsize + case.fixed_bytes
    # tf32 has half of bfloat16's rate; float32 takes three tf32 products, except on AMD, which
    # multiplies it directly.
    tf32 = chip.matrix / 2
    exact = chip.vector if chip.target.backend == "hip" else tf32 / 3
    peak = {"fp32": exact, "tf32": tf32}.get(dtype, chip.matrix)
    best = max(case.flops / peak / 1e6, size / chip.bandwidth / 1e3)
    shared = {"gflop": case.flops / 1e9, "mib": size / 2**20, "best_us": best}
    rows: list[dict[str, Any]] = []
    kernels = [examine(*each) for each in found]
    for each in kernels:
        wrong = fails(each, chip)
        alike = [other.wide for other in kernels if other.kernel == each.kernel]
        if case.wide and each.kernel not in SMALL and not any(alike):
            wrong.append("no loads of 16 bytes in any configuration")
        place = {"chip": arch, "case": name, "dtype": dtype}
        rows.append(asdict(each) | place | {"fails": wrong} | shared)
    return rows


def fails(kernel: Compiled, chip: Chip) -> list[str]:
    """Returns the problems of a kernel; [] if there are none."""
    found = []
    if kernel.shared > chip.shared:
        found.append(f"{kernel.shared} bytes of shared memory")
    if kernel.spills:
        found.append(f"{kernel.spills} spilled")
    if kernel.kernel in PRODUCTS and not kernel.matrix:
        found.append("no matrix instructions")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compiles the kernels, prints failures, and writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--chip", nargs="+", choices=tuple(CHIPS), default=list(CHIPS))
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="SUBSTRING",
        help="cases with one of these in them",
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    options = parser.parse_args(argv)
    try:
        command.check_outputs(options.out, None)
        every = cases()
        for part in options.only:
            if not any(part in case.name for case in every):
                raise ConfigError(f"--only: no case has {part!r} in its name")
        chosen = [case for case in every if any(part in case.name for part in options.only)]
    except (ConfigError, OSError) as error:
        print(f"gpu_static: {command.sentence(error)}", file=sys.stderr)
        return command.EXIT_BAD_INPUT
    jobs = [
        (arch, case.name, dtype)
        for case in chosen
        for dtype in case.dtypes
        for arch in options.chip
        if dtype in options.dtype
    ]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        rows = [row for some in pool.starmap(compile_case, jobs, chunksize=1) for row in some]
    failed = [row for row in rows if row["fails"]]
    for row in failed:
        place = ", ".join(row[name] for name in ("chip", "case", "dtype", "kernel", "config"))
        print(f"{place}: {'; '.join(row['fails'])}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(failed)} fail")
    result = {
        "script": "gpu_static", "triton": triton.__version__, "torch": torch.__version__,
        "chips": {arch: {**asdict(chip), "target": arch} for arch, chip in CHIPS.items()},
        "rows": rows,
    }  # fmt: skip
    if options.out:
        show.write_json(options.out, result)
    return command.EXIT_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
