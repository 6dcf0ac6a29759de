"""A lock file that one process at a time can hold."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"  # in a folder that one process at a time writes


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Creates, locks and finally removes a file. Raises BlockingIOError if it is locked already."""
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            # If the owner removed the file after it was opened here, this lock excludes nobody.
            if _is_at(descriptor, path):
                try:
                    yield
                finally:
                    with suppress(OSError):  # a failure must not spoil a finished run
                        path.unlink()
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # no lock support
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
