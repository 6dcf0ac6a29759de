"""Shared fixtures: texts, instruction sets, thread counts, full disks, signals."""

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the processes of `pytest -n` share the cores
    tell = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    threads = len(tell(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import torch  # noqa: E402

from gptfast.ops import select  # noqa: E402

# torch keeps compiled graphs between processes and knows an operator by its name alone: one that an
# earlier state of the sources left would have other shapes. Workers take their parent's folder.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="gptfast-compiled-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name
os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import of Hugging Face's libraries
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before a module with a kernel is imported

from command_line import QUESTION  # noqa: E402
from training_steps import SIGNALS  # noqa: E402

from gptfast import Trainer  # noqa: E402

SHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "data" / "shakespeare.txt"


@pytest.fixture(autouse=True)
def no_plans_of_other_tests() -> None:
    """Forgets how operators were called on a GPU: a test may change constants of their kernels."""
    recording = sys.modules.get("gptfast.ops.triton.recording")
    if recording is not None:
        recording.forget()


@pytest.fixture(scope="session")
def shakespeare_path() -> Path:
    """The file with Tiny Shakespeare, which is not committed; tests are skipped without it."""
    if not SHAKESPEARE.is_file():
        pytest.skip("Tiny Shakespeare is not at ../shared/data/shakespeare.txt")
    return SHAKESPEARE


@pytest.fixture(scope="session")
def shakespeare_text(shakespeare_path: Path) -> str:
    """The text of Tiny Shakespeare."""
    return shakespeare_path.read_bytes().decode("utf-8")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with QUESTION, which no test changes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(QUESTION)
    return path


@pytest.fixture
def disk_full() -> Callable[..., NoReturn]:
    """A function that takes anything and fails as a write to a full disk does."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at each instruction set that machine and build support."""
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


@pytest.fixture(autouse=True)
def threads_of_other_tests() -> Iterator[None]:
    """Restores torch's number of threads: tests and commands change it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that schedules an action after some of the following steps."""
    step = Trainer.step

    def set_action(action: Callable[[], object], *numbers: int) -> None:
        done = []

        def step_and_act(self: Trainer, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            done.append(1)
            loss = step(self, idx, targets)
            if len(done) in numbers:
                action()
            return loss

        monkeypatch.setattr(Trainer, "step", step_and_act)

    return set_action


@pytest.fixture
def press(after_step: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Returns a function that sends a signal after given steps; restores the handlers."""
    usual = {number: signal.SIG_DFL for number in SIGNALS}
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield lambda number, *steps: after_step(lambda: signal.raise_signal(number), *steps)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ctrl_c(press: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that sends SIGINT in given steps; restores the handler."""
    return lambda *steps: press(signal.SIGINT, *steps)
