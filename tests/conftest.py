"""Shared fixtures: the texts that tests read, the instruction sets that kernels run at."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptfast.ops import select

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel's module is imported

SHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "data" / "shakespeare.txt"


@pytest.fixture(scope="session")
def shakespeare_path() -> Path:
    """File with Tiny Shakespeare; it is not committed, so tests that need it skip without it."""
    if not SHAKESPEARE.is_file():
        pytest.skip("Tiny Shakespeare is not at ../shared/data/shakespeare.txt")
    return SHAKESPEARE


@pytest.fixture(scope="session")
def shakespeare_text(shakespeare_path: Path) -> str:
    """Tiny Shakespeare as one string."""
    return shakespeare_path.read_bytes().decode("utf-8")


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at each instruction set that this machine and build have."""
    extension = select.extension()
    if extension is None:
        pytest.skip(f"{select.extension_error}")
    reason = extension.isa_levels()[request.param]
    if reason is not None:
        pytest.skip(reason)
    before = extension.isa_current()
    extension.isa_set(request.param)
    yield request.param
    extension.isa_set(before)


@pytest.fixture
def any_threads() -> Iterator[None]:
    """For tests that change torch's number of threads: it is what it was afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
