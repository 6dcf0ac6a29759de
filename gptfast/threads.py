"""How many threads are worth using: torch's number, unless the process has fewer CPUs than that.

torch counts the processors that it sees. A container's CPU quota is no part of that count, and
threads beyond it only wait for each other at every barrier.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast.checks import whole
from gptfast.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ThreadLimits:
    """What bounds the number of threads.

    Attributes:
        torch: size of torch's thread pool, which the kernels use.
        affinity: processors that the process may run on.
        quota: processors' worth of time that its control group gets; None without a quota.
    """

    torch: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        """The largest number of threads that can all run at once."""
        within_quota = self.torch if self.quota is None else max(1, int(self.quota))
        return min(self.torch, self.affinity, within_quota)


def limits() -> ThreadLimits:
    """Returns the bounds of this process as they are now."""
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
    else:
        affinity = os.cpu_count() or 1
    return ThreadLimits(torch.get_num_threads(), affinity, cgroup_quota())


def use_usable_threads() -> None:
    """Lowers torch's thread count to the usable one; a program calls it once, at its start."""
    found = limits()
    if found.usable < found.torch:
        torch.set_num_threads(found.usable)


def check_threads(name: str, value: int) -> int:
    """A number of threads that torch's pool may be given, as an int.

    More threads than the system starts end the process: the OpenMP library knows no error.

    Raises:
        ConfigError: it is below 1 or far above the number of processors; `name` is the option's.
    """
    count, most = whole(value), max(256, 4 * (os.cpu_count() or 1))
    if count is None or not 1 <= count <= most:
        raise ConfigError(
            f"{name} must be a whole number from 1 to {most} on this machine, got {value!r}"
        )
    return count


def cgroup_quota(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Returns the CPU quota of the process's control group, in processors.

    Args:
        root: where the control groups are mounted.
        membership: the file that names the groups of the process, one `id:controllers:path` a line.

    Returns:
        The smallest quota of the group and the groups around it; None when none has one.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: one tree for all controllers
            mounts = [root]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:
            folders = [mount / part for part in (group, *group.parents)]
            quotas += [quota for folder in folders if (quota := _folder_quota(folder)) is not None]
    return min(quotas, default=None)


def _folder_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        quota = int(limit) / int(period)
    except (OSError, ValueError):  # no such file, or "max" for no limit
        return None
    return quota if quota > 0 else None
