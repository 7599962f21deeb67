"""How much memory the host has, or the container where that is less."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a control group, in its version's words. idle: a line of ``stat`` with file cache that goes first."""

    most: str
    used: str
    stat: str
    idle: str


_VERSIONS = (
    _Names("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Names("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes. free: what may be taken without anything being swapped or killed."""

    total: int
    free: int

    @classmethod
    def now(cls, cgroup: Path = _CGROUP) -> HostMemory:
        host = psutil.virtual_memory()
        total, free = int(host.total), int(host.available)
        for names in _VERSIONS:
            limit = _limit(cgroup, names)
            if limit is not None:
                total, free = min(total, limit.total), min(free, limit.free)
        return cls(total, free)


def _limit(cgroup: Path, names: _Names) -> HostMemory | None:
    """What a control group allows; None where there is none, or it has no limit. Its file cache gives way, as a
    host's does, and counts as free."""
    try:
        most, used = ((cgroup / name).read_text().strip() for name in (names.most, names.used))
        stat = (cgroup / names.stat).read_text()
    except OSError:
        return None
    if most == "max":
        return None
    idle = re.search(rf"^{names.idle} (\d+)$", stat, re.MULTILINE)
    used_now = int(used) - (int(idle[1]) if idle else 0)
    return HostMemory(int(most), max(int(most) - used_now, 0))
