"""How many threads torch is to use on a CPU: as many as there are cores that this process may really have.

OpenMP knows the affinity mask, but neither a container's quota nor that two hardware threads share one core's units.
More threads than cores make every parallel loop wait for whoever was put off.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/")


def use_all_cores() -> int:
    """Set torch's threads, unless OMP_NUM_THREADS says how many; returns how many it uses."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(usable_cores())
    return torch.get_num_threads()


def usable_cores(root: Path = _ROOT) -> int:
    """Cores in the affinity mask, no more than the control groups' quota, at least 1. root: of /proc and /sys."""
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_core(root, number) for number in mask})
    quotas = list(_quotas(root))
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def _core(root: Path, number: int) -> str:
    """What names the core of a hardware thread: all that share it."""
    siblings = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    return _read(siblings) or str(number)


def _quotas(root: Path) -> Iterator[float]:
    """In cores, of this process' groups and of those above them, where they have one."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup" / ("cpu" if "cpu" in controllers.split(",") else "")
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            quota = _quota(folder)
            if quota is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    """Version 2 of control groups keeps both numbers in one file, version 1 in two. "max" and -1: none."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    quota = quota or _read(folder / "cpu.cfs_quota_us")
    period = period or _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _read(path: Path) -> str:
    """Empty where it is not there, as on other systems and in some containers."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
