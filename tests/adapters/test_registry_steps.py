"""A process that dies at any single step of a change, and what the next start makes of it."""

from __future__ import annotations

import itertools
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import pytest

from onebase.adapters.registry import Registry

from .registry_helpers import on_disk, push

Step: TypeAlias = tuple[str, str, int]


class Killed(BaseException):
    """The process ends here."""


PART = "onebase.adapters.registry"
BLOBS, STAGE, SWEEPER = (f"{PART}.{part}" for part in ("blobs", "stage", "collection:Sweeper"))
# (where, what, which call of it): four syncs make a push durable: two files, their folder, the folder of blobs
PUSH = [(STAGE, name, 1) for name in ("check_folder", "check_finite", "digest_of")]
PUSH += [(STAGE, "sync", call) for call in (1, 2, 3)] + [(BLOBS, "sync", 1)]
PUSH += [(f"{BLOBS}:os", "rename", 1), (BLOBS, "remove", 1)]
PUSH += [(f"{PART}.changes:Changes", "add_version", 1), (f"{PART}.database:Database", "_commit", 1)]
PUSH += [(SWEEPER, "collect", 1), (f"{PART}.queries:Queries", "_entry", 1)]
DELETE = [(SWEEPER, "collect", 1), (f"{BLOBS}:os", "rename", 1), (BLOBS, "remove", 1)]


def abandon(registry: Registry) -> None:
    """What the kernel does when a process dies: the lock and the database close, nothing is tidied."""
    registry._guard.close()
    registry._db.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", PUSH, ids=str)
def test_a_crash_in_a_push(
    step: Step, after: bool, root: Path, adapter: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(root, "base")
    first = push(registry, "a", adapter)
    with monkeypatch.context() as patch:
        _die_at(step, after, patch)
        with pytest.raises(Killed):
            push(registry, "a", other)
    abandon(registry)

    registry = Registry(root, "base")
    entries = registry.versions("a")
    assert entries[0] == first
    assert registry.get("a") == entries[-1]
    assert on_disk(root) == {entry.digest for entry in entries}
    assert push(registry, "a", other).digest == registry.get("a").digest != first.digest
    assert registry.stage_folder(adapter).digest == first.digest, "the blob is whole"
    registry.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", DELETE, ids=str)
def test_a_crash_in_a_delete(
    step: Step, after: bool, root: Path, adapter: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(root, "base")
    push(registry, "a", adapter)
    kept = push(registry, "b", other)
    with monkeypatch.context() as patch:
        _die_at(step, after, patch)
        with pytest.raises(Killed):
            registry.delete("a")
    abandon(registry)
    registry = Registry(root, "base")
    assert registry.list().entries == (kept,)
    assert on_disk(root) == {kept.digest}
    registry.close()


def _die_at(step: Step, after: bool, patch: pytest.MonkeyPatch) -> None:
    where, name, call = step
    owner = pkgutil.resolve_name(where)
    real, calls = getattr(owner, name), itertools.count(1)

    def dies(*args: object, **options: object) -> object:
        if next(calls) != call:
            return real(*args, **options)
        if after:
            real(*args, **options)
        raise Killed(step)

    patch.setattr(owner, name, dies)


CHILD = """
import os, sys
from pathlib import Path
from onebase.adapters.registry import Registry
registry = Registry(Path(sys.argv[1]), "base")
blob = registry.stage_folder(Path(sys.argv[2]))
registry.commit("a", blob, "child", family="LORA", rank=4, nbytes=1)
registry.stage_folder(Path(sys.argv[3]))
unfinished = registry.stage()
unfinished.__enter__().open("adapter_model.safetensors").write(b"half")
os._exit(9)
"""


def test_a_process_that_dies_for_real(root: Path, adapter: Path, other: Path) -> None:
    arguments = [sys.executable, "-c", CHILD, str(root), str(adapter), str(other)]
    assert subprocess.run(arguments, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
    assert len(list((root / "blobs").iterdir())) == 2
    registry = Registry(root, "base")
    assert len(registry.recovered) == 2
    assert on_disk(root) == {registry.get("a").digest}
    registry.close()


def test_start_up_reconciles(root: Path, adapter: Path, other: Path) -> None:
    registry = Registry(root, "base")
    first, second = push(registry, "a", adapter), push(registry, "a", other)
    push(registry, "b", other)
    registry.close()
    shutil.rmtree(second.path)
    (root / "blobs" / "orphan").mkdir()
    (root / "staging" / "half").write_bytes(b"x")

    registry = Registry(root, "base")
    log = "\n".join(registry.recovered)
    assert all(text in log for text in ("a@2", "b@1", second.digest, "blobs/orphan", "staging/half"))
    assert registry.list().entries == (first,)
    assert on_disk(root) == {first.digest}
    assert push(registry, "a", other).version == 3
    registry.close()
    registry = Registry(root, "base")
    assert registry.recovered == []
    registry.close()
