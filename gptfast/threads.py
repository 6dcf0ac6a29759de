"""Finds how many threads can run at once: torch's number, or fewer if a CPU limit is lower.

torch counts processors but ignores a container's CPU quota. Threads in excess of the quota only add
waiting time at every barrier. Several processes that train one model share the processors, where
torchrun would give each of them one thread.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast.checks import as_int
from gptfast.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ThreadLimits:
    """The limits on the number of threads.

    Attributes:
        torch: Size of torch's thread pool, which the kernels use.
        affinity: Number of processors that the process may run on.
        quota: CPU time limit of its control group, in processors; None if there is no limit.
        processes: How many processes of this run share them on this machine.
    """

    torch: int
    affinity: int
    quota: float | None
    processes: int = 1

    @property
    def usable(self) -> int:
        """The largest number of threads that can all run at once, in all of the processes."""
        machine = self.affinity if self.quota is None else min(self.affinity, int(self.quota))
        share = max(1, machine // self.processes)
        # torchrun sets one thread, where the user has set none.
        return share if self.processes > 1 and self.torch == 1 else min(self.torch, share)


def limits() -> ThreadLimits:
    """Returns the current limits of this process."""
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
    else:
        affinity = os.cpu_count() or 1
    return ThreadLimits(torch.get_num_threads(), affinity, cgroup_quota(), local_processes())


def local_processes() -> int:
    """Returns how many processes torchrun has started on this machine; 1 without it."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(count)) if count.isdecimal() else 1


def use_usable_threads() -> None:
    """Sets torch's thread count to the usable number; a program calls this once, at its start."""
    found = limits()
    if found.usable != found.torch:
        torch.set_num_threads(found.usable)


def check_threads(name: str, value: int) -> int:
    """Checks a number of threads for torch's pool and returns it as an int.

    The limit exists because the OpenMP library ends the process when a thread cannot be started.

    Args:
        name: The option's name, for the error message.
        value: The number of threads.

    Raises:
        ConfigError: `value` is not an integer from 1 to max(256, 4 times the processors).
    """
    count, most = as_int(value), max(256, 4 * (os.cpu_count() or 1))
    if count is None or not 1 <= count <= most:
        raise ConfigError(
            f"{name} must be a whole number from 1 to {most} on this machine, got {value!r}"
        )
    return count


def cgroup_quota(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Returns the CPU quota of the process's control group, in processors.

    Args:
        root: The directory in which the control groups are mounted.
        membership: The file that lists the process's groups, one `id:controllers:path` per line.

    Returns:
        The smallest quota of the group and its ancestors; None if none of them has a quota.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # cgroup v2: one hierarchy for all controllers
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
    except (OSError, ValueError):  # no such file, or "max", which means no limit
        return None
    return quota if quota > 0 else None
