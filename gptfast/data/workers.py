"""Several processes that do jobs of one kind; their results come in the order of the jobs.

Each process has a pipe of its own, so we notice at once if one is killed. The processes of a
`ProcessPoolExecutor` share a pipe, in which a killed one can block the others' results behind half
a message.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from gptfast.errors import DataError, GptfastError, reason

Job = TypeVar("Job")
Result = TypeVar("Result")


def mapped(work: Callable[[Job], Result], jobs: Iterable[Job], processes: int) -> Iterator[Result]:
    """Yields the result of each job, computed by several processes.

    At most one job per process is begun and not yet yielded.

    Args:
        work: Does a job; picklable, like jobs and results.
        jobs: The jobs.
        processes: How many, at least 1. They are new interpreters, because the fork of a process
            with threads, such as torch's, may hang.

    Raises:
        DataError: A process was ended from outside.
        GptfastError: What `work` raised.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[Any] = []
    pipes: list[Connection] = []
    try:
        with _ignored_interrupts():
            for _ in range(processes):
                ours, theirs = context.Pipe()
                pipes.append(ours)
                worker = context.Process(target=_serve, args=(work, theirs), daemon=True)
                try:
                    worker.start()
                except OSError as error:
                    what = f"{processes} processes cannot be started ({reason(error)})"
                    raise DataError(what) from error
                workers.append(worker)
                theirs.close()
        begun = 0
        for job in jobs:
            pipe = pipes[begun % processes]
            if begun >= processes:
                yield _received(pipe)
            _send(pipe, job)
            begun += 1
        for i in range(max(0, begun - processes), begun):
            yield _received(pipes[i % processes])
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.terminate()
            worker.join()


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    with suppress(EOFError, OSError):  # the other process has ended
        while True:
            job = pipe.recv()
            try:
                answer = work(job)
            except GptfastError as error:
                answer = error
            except Exception as error:
                answer = DataError(f"a text cannot be encoded ({type(error).__name__}: {error})")
            pipe.send(answer)


def _send(pipe: Connection, job: Any) -> None:
    try:
        pipe.send(job)
    except OSError:
        raise _ended() from None


def _received(pipe: Connection) -> Any:
    try:
        answer = pipe.recv()
    except (EOFError, OSError):
        raise _ended() from None
    if isinstance(answer, GptfastError):
        raise answer
    return answer


def _ended() -> DataError:
    return DataError("a process that encoded texts was ended from outside")


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Ignores Ctrl-C; child processes that start meanwhile inherit this and ignore it for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
