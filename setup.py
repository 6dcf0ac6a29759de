"""Builds gptfast._C: the pybind11 module, the torch operators, the kernels per instruction set.

GPTFAST_BUILD_EXT=0 leaves the extension out, DEBUG=1 builds for the debugger, MAX_JOBS limits the
compiler processes, CXX names the compiler.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
KERNELS, TEMP = ROOT / "csrc" / "kernels", ROOT / "build" / "temp"
SOURCES = [path for path in ROOT.glob("csrc/**/*.cpp") if path.parent.name != "levels"]

CXX = os.environ.get("CXX") or "c++"
FLAGS = "-O0 -g -UNDEBUG" if os.environ.get("DEBUG") == "1" else "-O3 -g0"
FLAGS += " -fvisibility=hidden -Wall"
STANDARD = "-std=c++20"  # torch before 2.12 would select an older standard
KERNEL_FLAGS = f"{STANDARD} -fPIC -ffp-contract=fast -fno-math-errno -fno-trapping-math"
# g++'s SLP vectorizer causes stalls (microkernel.inl); its own headers trigger the two warnings.
KERNEL_FLAGS += " -fno-tree-slp-vectorize -Wno-maybe-uninitialized -Wno-uninitialized"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = AVX2 + " -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
AVX512_BF16 = AVX512 + " -mavx512bf16"
# Emulates AMX tiles in memory (amx.inl), to test the AMX kernels on a processor without AMX.
EMULATED = os.environ.get("GPTFAST_AMX_EMULATED") == "1"
MACROS = {"TORCH_TARGET_VERSION": "0x020a000000000000", "GPTFAST_AMX_EMULATED": f"{EMULATED:d}"}
AMX = AVX512_BF16 + (" -DGPTFAST_AMX_EMULATED=1" if EMULATED else " -mamx-tile -mamx-bf16")
ISA_FLAGS = {"generic": "", "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def problem(header: str, flags: str) -> str | None:
    """Returns why the compiler cannot compile `header` with `flags`, or None if it can."""
    command = f"echo '#include <{header}>' | {CXX} -x c++ -c - -o {os.devnull} {flags}"
    status, text = subprocess.getstatusoutput(command)
    return text.partition("\n")[0] if status else None


def no_extension_reason() -> str | None:
    if os.environ.get("GPTFAST_BUILD_EXT") == "0":
        return "installed with GPTFAST_BUILD_EXT=0"
    line = problem("Python.h", f"-I{quote(sysconfig.get_path('include'))}")
    return line and f"no working C++ compiler with the headers of Python ({line})"


def digest(folder: Path) -> str:  # gptfast/info.py computes the same hash of csrc
    files = sorted(folder.rglob("*.[chi]*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def compile_isa(isa: str) -> str:
    """Compiles isa/levels/<isa>.cpp unless its object is up to date (same flags, same kernels)."""
    target, stamp = TEMP / f"isa_{isa}.o", TEMP / f"isa_{isa}.stamp"
    command = f"{CXX} {FLAGS} {KERNEL_FLAGS} {ISA_FLAGS[isa]} "
    command += f"-c csrc/kernels/isa/levels/{isa}.cpp -o build/temp/isa_{isa}.o"  # as in a copy
    state = f"{digest(KERNELS)} {command}"
    if not (target.exists() and stamp.exists() and stamp.read_text() == state):
        stamp.unlink(missing_ok=True)
        subprocess.run(f"set -x; {command}", shell=True, check=True, cwd=ROOT)
        stamp.write_text(state)
    return str(target)


class BuildExt(BuildExtension):
    """Compiles the kernels once per instruction set; records what was built, or why nothing was."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(TEMP)  # pip's folder is always new, so everything would be recompiled

    def run(self) -> None:
        reason = no_extension_reason()
        if reason is not None:
            print(f"gptfast gets no compiled part: {reason}", file=sys.stderr)
            self.extensions: list = []
            for stale in (ROOT / "gptfast").glob("_C*.so") if self.inplace else ():
                stale.unlink()
        facts: dict = {"reason": reason, "torch": torch.__version__, "csrc": digest(ROOT / "csrc")}
        facts["compiler"] = subprocess.getoutput(f"{CXX} --version").partition("\n")[0]
        describe = f"git -C {quote(str(ROOT))} describe --always --dirty 2>{os.devnull}"
        facts["git"] = subprocess.getoutput(describe)
        facts["isa"] = self.add_kernels() if self.extensions else {}
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "gptfast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(facts, indent=2) + "\n")

    def add_kernels(self) -> dict[str, str | None]:
        header = {isa: "immintrin.h" if isa != "generic" else "vector" for isa in ISA_FLAGS}
        problems = {isa: problem(header[isa], ISA_FLAGS[isa]) for isa in ISA_FLAGS}
        built = [isa for isa, line in problems.items() if line is None]
        TEMP.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            self.extensions[0].extra_objects += pool.map(compile_isa, built)
        self.extensions[0].define_macros += [(f"GPTFAST_HAVE_{isa.upper()}", "1") for isa in built]
        return problems


extension = CppExtension(
    "gptfast._C",
    sorted(path.relative_to(ROOT).as_posix() for path in SOURCES),
    include_dirs=[pybind11.get_include()],
    define_macros=[*MACROS.items()],
    extra_compile_args=[*FLAGS.split(), STANDARD],
)
extension.libraries = ["torch_cpu"]  # the stable ABI needs no other library
# Finds ninja beside python, also if the virtual environment is not activated.
os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
