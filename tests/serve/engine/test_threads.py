"""Threads follow the cores that a process may have: the mask, shared cores, quotas of both kinds of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from onebase.serve.engine import threads
from onebase.serve.engine.threads import usable_cores, use_all_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight hardware threads on four cores, all in the mask, no quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for number in range(8):
        write(
            tmp_path,
            f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list",
            f"{number % 4},{number % 4 + 4}",
        )
    write(tmp_path, "proc/self/cgroup", "0::/pod/server")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_hardware_threads_of_one_core_count_once(machine: Path) -> None:
    assert usable_cores(machine) == 4


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 4)]
)
@pytest.mark.parametrize("group", ["", "pod", "pod/server"])
def test_a_quota_bounds_them_wherever_it_stands(machine: Path, quota: str, cores: int, group: str) -> None:
    write(machine, f"sys/fs/cgroup/{group}/cpu.max", quota)
    assert usable_cores(machine) == cores


def test_quotas_of_the_first_version(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "5:memory:/other\n4:cpu,cpuacct:/pod")
    write(machine, "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us", "300000")
    write(machine, "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us", "100000")
    write(machine, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    assert usable_cores(machine) == 3


def test_where_nothing_is_known_the_mask_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5})
    assert usable_cores(tmp_path) == 3


def test_what_the_environment_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(threads, "usable_cores", lambda: before + 1)
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
        assert use_all_cores() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert use_all_cores() == before + 1
    finally:
        torch.set_num_threads(before)
