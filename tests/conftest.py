"""Shared fixtures: the texts that tests read."""

from pathlib import Path

import pytest

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
