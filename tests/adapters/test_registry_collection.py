"""A large collection or deletion holds nobody up: the registry's lock is held for some removals at a time."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from onebase.adapters.registry import Registry
from onebase.adapters.registry.changes import NewVersion
from onebase.adapters.registry.collection import AT_ONCE

MANY = 3 * AT_ONCE


class WatchedLock:
    """A lock that counts, for each time it is held, what was removed meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.depth = 0
        self.removed = [0]

    def __enter__(self) -> None:
        self._lock.acquire()
        if not self.depth:
            self.removed.append(0)
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1
        self._lock.release()


@pytest.fixture
def lock(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> WatchedLock:
    """The registry's; measuring and emptying the trash must not happen under it."""
    watched, blobs = WatchedLock(), registry._blobs
    remove, nbytes, empty = blobs.remove, blobs.nbytes, blobs.empty_trash

    def counting(digest: str) -> bool:
        assert watched.depth == 1, "a removal is decided under the lock"
        watched.removed[-1] += 1
        return remove(digest)

    def unlocked(function: Any) -> Any:
        def call(*args: Any) -> Any:
            assert not watched.depth
            return function(*args)

        return call

    monkeypatch.setattr(registry._db, "lock", watched)
    monkeypatch.setattr(blobs, "remove", counting)
    monkeypatch.setattr(blobs, "nbytes", unlocked(nbytes))
    monkeypatch.setattr(blobs, "empty_trash", unlocked(empty))
    return watched


def add_versions(registry: Registry, root: Path, name: str, count: int) -> None:
    """So many, with a folder each, faster than by pushing them."""
    with registry._db.transaction():
        for index in range(count):
            digest = f"{index:064x}"
            registry._change.add_version(name, NewVersion(digest, "LORA", 4, 1, "test", None, ""))
            (root / "blobs" / digest).mkdir()
            (root / "blobs" / digest / "file").write_bytes(b"12")
        registry._db.run("UPDATE names SET previous = NULL")  # nothing but the newest is spared


def test_gc_removes_in_small_steps(registry: Registry, root: Path, lock: WatchedLock) -> None:
    add_versions(registry, root, "a", MANY + 1)
    said = registry.gc(keep=0, dry_run=True)
    done = registry.gc(keep=0, dry_run=False)
    assert done == said
    assert (len(done.versions), len(done.blobs)) == (len(done.unused), len(done.blobs)) == (MANY, MANY)
    assert done.nbytes == 2 * MANY
    assert (sum(lock.removed), max(lock.removed)) == (MANY, AT_ONCE)
    assert len(list((root / "blobs").iterdir())) == 1


def test_a_name_with_many_versions_is_deleted_in_small_steps(registry: Registry, root: Path, lock: WatchedLock) -> None:
    add_versions(registry, root, "a", MANY)
    assert len(registry.delete("a").unused) == MANY
    assert (sum(lock.removed), max(lock.removed)) == (MANY, AT_ONCE)
    assert list((root / "blobs").iterdir()) == list((root / "staging").iterdir()) == []


def test_what_is_used_again_during_a_collection_stays(
    registry: Registry, root: Path, lock: WatchedLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_versions(registry, root, "a", MANY + 1)
    held, named = f"{MANY - 1:064x}", f"{MANY - 2:064x}"
    empty = registry._blobs.empty_trash

    def between_two_steps() -> None:
        if not registry._blobs.is_held(held):
            registry._blobs.hold(held)
            with registry._db.transaction():
                registry._change.add_version("b", NewVersion(named, "LORA", 4, 1, "test", None, ""))
        empty()

    monkeypatch.setattr(registry._blobs, "empty_trash", between_two_steps)
    report = registry.gc(keep=0, dry_run=False)
    assert {held, named}.isdisjoint(report.blobs)
    assert (len(report.blobs), report.nbytes) == (MANY - 2, 2 * (MANY - 2))
    assert {folder.name for folder in (root / "blobs").iterdir()} == {held, named, f"{MANY:064x}"}


def test_the_search_for_old_versions_grows_with_their_number_alone(registry: Registry, root: Path) -> None:
    def steps() -> int:
        counted = [0]

        def count() -> int:
            counted[0] += 1
            return 0

        registry._db._db.set_progress_handler(count, 100)
        registry.gc(keep=1, dry_run=True)
        registry._db._db.set_progress_handler(None, 0)
        return counted[0]

    add_versions(registry, root, "a", 500)
    before = steps()
    with registry._db.transaction():
        for index in range(500, 1000):
            registry._change.add_version("a", NewVersion(f"{index:064x}", "LORA", 4, 1, "test", None, ""))
    assert steps() < 3 * before
