"""Several processes that train one model: how they find each other, agree, and end together.

torchrun starts them and tells each by environment variables which one it is. Every process has the
same arguments, draws the same numbers, and computes its own part of each batch. All that they
exchange besides gradients goes through the CPU, by gloo.

`first` means the process of rank 0, the only one that writes and shows.
"""

import atexit
import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from gptfast.errors import ConfigError, GptfastError
from gptfast.threads import local_processes

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # without an answer; a save or an evaluation must be shorter
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessError(GptfastError, RuntimeError):
    """Another process of the run has ended or does not answer, or they did not find each other."""


@dataclass(frozen=True)
class Agreed:
    """What the processes of a run know of each other after a step."""

    loss: float = math.nan  # the sum of their shares, in the order of ranks
    signal: int | None = None  # that one of them received
    stopped: bool = False  # whether a callback of one has ended the run
    waited: float = 0.0  # seconds since the last save, by the first one's clock


@dataclass(frozen=True)
class Processes:
    """The processes that train one model. By default this one is alone, and nothing is sent.

    Attributes:
        rank: Which of them this one is.
        size: Their number.
        control: The group by which they agree, of gloo; None alone.
    """

    rank: int = 0
    size: int = 1
    control: Any = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    def gathered(self, *values: float) -> list[list[float]]:
        """Returns the values of every process, in the order of ranks."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _answered():
            dist.all_gather(found, own, group=self.control)
        return [each.tolist() for each in found]

    def agreed(self, loss: float, received: int | None, stopped: bool, waited: float) -> Agreed:
        """Exchanges these values with the other processes; returns what all then know."""
        rows = self.gathered(loss, float(received or 0), float(stopped), waited)
        losses, signals, stops, waits = zip(*rows, strict=True)
        return Agreed(sum(losses), int(max(signals)) or None, any(stops), waits[0])

    def from_first(self, work: Callable[[], T]) -> T:
        """Has the first process do something; all get its result, or raise its error."""
        if self.size == 1:
            return work()
        result: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                result[0] = work()
            except Exception as error:
                failure = error
                result[1] = error if isinstance(error, GptfastError) else GptfastError(str(error))
        with _answered():
            dist.broadcast_object_list(
                result, src=0, group=self.control, device=torch.device("cpu")
            )
        if failure is not None or result[1] is not None:
            raise failure or result[1]
        return result[0]

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            with _answered():
                dist.monitored_barrier(self.control, timeout=TIMEOUT)

    @contextmanager
    def losses_noticed(self, kept: str) -> Iterator[None]:
        """Makes one sentence of the errors that the loss of another process causes here.

        torchrun then ends this process by SIGTERM; we ignore it, so that the sentence is printed.

        Args:
            kept: The end of the sentence.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1 or not _is_of_a_loss(error):
                raise
            if is_one_of_several() and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise ProcessError(f"{_GONE}: {kept}") from error


ALONE = Processes()
_GONE = f"another process of the run has ended, or did not answer for {TIMEOUT.seconds // 60} min"


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(_GONE) from error


def _is_of_a_loss(error: Exception) -> bool:
    """Whether a collective raised it; gloo raises plain RuntimeError, known only by its text."""
    known = (ProcessError, dist.DistError)
    return isinstance(error, known) or isinstance(error, RuntimeError) and "gloo" in str(error)


def join(device: torch.device, timeout: timedelta = TIMEOUT) -> Processes:
    """Finds the other processes of the run; the first call waits for them.

    A process that torchrun did not start is alone, unless the program has made a process group,
    which is used then.

    Args:
        device: Where this process trains.
        timeout: How long another process may take to answer.

    Raises:
        ProcessError: They did not find each other.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if not is_one_of_several():
            return ALONE
        try:
            backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
            dist.init_process_group(backend, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise ProcessError(f"the processes did not find each other: {first_line}") from error
        atexit.register(dist.destroy_process_group)
    if dist.get_world_size() == 1:
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size(), _control())


@cache
def _control() -> Any:
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def is_one_of_several() -> bool:
    """Whether torchrun, or another program that sets its variables, started several processes."""
    return all(name in os.environ for name in ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


def own_device(device: torch.device) -> torch.device:
    """Returns the device of this process: of several on a machine, each has a GPU of its own.

    Args:
        device: The run's; a GPU has no number where there are several processes.

    Raises:
        ConfigError: It names one GPU for all, or there are fewer GPUs than processes.
    """
    count = local_processes()
    if device.type != "cuda" or count == 1:
        return device
    there = torch.cuda.device_count()
    if device.index is not None or there < count:
        raise ConfigError(
            f"{count} processes on this machine need a GPU each, device 'cuda', "
            f"got device {str(device)!r} on a machine with {there}"
        )
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def is_first() -> bool:
    """Whether this is the process of its run that shows, as torchrun's variables say."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


def says(sentence: str) -> bool:
    """Whether this process prints a message that only one of several should print.

    A process that cannot ask the others prints it.
    """
    if not is_one_of_several():
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"gptfast/{attempt}/{hashlib.sha256(sentence.encode()).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(key, 1) == 1
    except (RuntimeError, ValueError):
        return True
