"""The number of cores that this process may use: those of its affinity, within the CPU quota of its control groups.

A container with half a CPU still sees all cores of its host; with a thread for each of them, its tasks would use up
their time in a part of each period, and stand still for the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = "sys/fs/cgroup"
VERSION_1 = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
"""Folders in which systems mount the cpu controller of cgroup version 1."""
VERSION_2 = ("", "unified")


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores, at least 1. A quota is rounded down.

    Args:
        root: The folder of ``proc`` and ``sys``.
    """
    return max(1, int(min(_affinity(), cpu_quota(root))))


def cpu_quota(root: Path) -> float:
    """Return the lowest quota of this process's control groups and all above them, in cores; infinity for none.

    Files that are missing or cannot be read count as no quota.
    """
    return min(_quotas(root), default=math.inf)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            for group in _groups(root, VERSION_2, path):
                yield _quota(*_text(group / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for group in _groups(root, VERSION_1, path):
                yield _quota(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _groups(root: Path, mounts: tuple[str, ...], path: str) -> Iterator[Path]:
    """Yield the folders of a control group and of all above it.

    A container may see its own group's files at the mount itself, while the path is that in the host.
    """
    relative = PurePosixPath(path.lstrip("/"))
    for mount in mounts:
        for each in (relative, *relative.parents):
            yield root / CGROUPS / mount / each


def _quota(quota: str = "", period: str = "", *_: str) -> float:
    """Return a quota in cores. "max" and -1 stand for none."""
    quota, period = quota.strip(), period.strip()
    if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
        return int(quota) / int(period)
    return math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
