"""When the disk fails: which error, what holds afterwards, and what start-up does not take for a loss."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import AdapterError, AdapterRejected, StorageFailed, StorageFull
from onebase.adapters.registry import Registry, blobs, database, stage, storage

from .registry_helpers import on_disk, push

# Runs under faults.c; what the test gives is ``step``.
SCRIPT = """
import ctypes, errno, os, sys
from pathlib import Path
from onebase.adapters.errors import StorageFailed, StorageFull, StorageUncertain
from onebase.adapters.registry import Registry
root, disk = Path(sys.argv[1]), ctypes.CDLL(None)
registry = Registry(root, "base")
def fails(kind, change):
    try:
        change()
    except StorageFailed as error:
        assert type(error) is kind, repr(error)
    else:
        raise AssertionError("it did not fail")
def folder():
    return str(root).encode()
"""


@pytest.fixture
def registry(root: Path, adapter: Path) -> Iterator[Registry]:
    """One adapter, a."""
    registry = Registry(root, "base")
    push(registry, "a", adapter)
    yield registry
    registry.close()


@pytest.fixture
def on_failing_disk(registry: Registry, root: Path, faults: Path) -> Callable[[str], None]:
    """Runs a script over the registry, and ends its process without tidying."""
    registry.close()

    def run(script: str) -> None:
        command = [sys.executable, "-P", "-c", SCRIPT + script + "\nos._exit(0)", str(root)]
        subprocess.run(command, check=True, env={**os.environ, "LD_PRELOAD": str(faults), "OMP_NUM_THREADS": "1"})

    return run


def test_a_commit_whose_sync_fails_is_gone_after_a_crash(on_failing_disk: Callable[[str], None], root: Path) -> None:
    """Its frames lie in the log, whole: only the fence keeps them from being taken up again."""
    on_failing_disk("""
registry.change("a", pinned=True)  # the log has its header, so that the next sync is of frames
disk.faults_fail_syncs(folder(), 1)
fails(StorageFailed, lambda: registry.change("a", labels={"team": "x"}))
assert not registry.get("a").labels
""")
    registry = Registry(root, "base")
    assert registry.get("a").labels == {}
    registry.close()


def test_no_change_is_taken_until_a_failed_one_is_undone(on_failing_disk: Callable[[str], None], root: Path) -> None:
    on_failing_disk("""
disk.faults_fail_all(folder(), errno.EIO)
fails(StorageFailed, lambda: registry.change("a", pinned=True))
disk.faults_fail_syncs(folder(), 0)
registry.change("a", pinned=False)
disk.faults_fail_syncs(folder(), 1000)
fails(StorageUncertain, lambda: registry.change("a", labels={"team": "x"}))
disk.faults_fail_all(folder(), errno.EIO)
fails(StorageFailed, lambda: registry.change("a", labels={"team": "y"}))
assert not registry.get("a").labels
disk.faults_fail_syncs(folder(), 0)
registry.change("a", labels={"stage": "z"})
assert registry.get("a").labels == {"stage": "z"}
""")
    registry = Registry(root, "base")
    assert (registry.get("a").labels, registry.get("a").pinned) == ({"stage": "z"}, False)
    registry.close()


def test_a_change_that_could_not_be_undone_holds_wholly_or_not_at_all(
    on_failing_disk: Callable[[str], None], root: Path, other: Path
) -> None:
    """The disk goes when the change is written, so nobody can take it back; a restart finds it, and its files."""
    on_failing_disk(f"""
blob = registry.stage_folder(Path({str(other)!r}))
registry.change("a", pinned=True)
disk.faults_end_at_sync(folder())
fails(StorageUncertain, lambda: registry.commit("b", blob, "test", family="LORA", rank=4, nbytes=1))
disk.faults_fail_syncs(folder(), 0)
registry.discard(blob)
assert registry.count() == 1
""")
    registry = Registry(root, "base")
    assert registry.recovered == []
    assert registry.get("b").version == 1
    assert on_disk(root) == {registry.get("a").digest, registry.get("b").digest}
    registry.close()


def test_a_full_disk_is_told_and_reads_go_on(on_failing_disk: Callable[[str], None], root: Path, adapter: Path) -> None:
    on_failing_disk(f"""
disk.faults_fail_all(folder(), errno.ENOSPC)
fails(StorageFull, lambda: registry.change("a", pinned=True))
fails(StorageFull, lambda: registry.stage_folder(Path({str(adapter)!r})))
assert not registry.get("a").pinned and registry.get("a").path.is_dir()
disk.faults_fail_syncs(folder(), 0)
assert registry.change("a", pinned=True).pinned
registry.discard(registry.stage_folder(Path({str(adapter)!r})))
""")
    registry = Registry(root, "base")
    assert registry.get("a").pinned
    assert on_disk(root) == {registry.get("a").digest}
    registry.close()


@pytest.mark.parametrize("change", ["delete", "gc"])
def test_a_full_disk_lets_itself_be_emptied(
    change: str, registry: Registry, root: Path, adapter: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(registry, "a", other)
    push(registry, "a", adapter)
    run = registry._db.run

    def full_but_for_the_reserve(sql: str, *values: object) -> int:
        if (root / "reserve").exists():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return run(sql, *values)

    assert (root / "reserve").stat().st_blocks * 512 >= 4 << 20
    with monkeypatch.context() as patch:
        patch.setattr(registry._db, "run", full_but_for_the_reserve)
        for refused in (lambda: registry.change("a", pinned=True), lambda: registry.change("a", labels={"team": "x"})):
            with pytest.raises(StorageFull):
                refused()
        assert (root / "reserve").exists(), "it is for what makes room"
        if change == "delete":
            registry.delete("a")
        else:
            assert len(registry.gc(keep=1, dry_run=False).versions) == 1
    assert registry.count() == (change == "gc")
    assert (root / "reserve").exists(), "and filled again"
    (root / "reserve").unlink()
    registry.gc(keep=None, dry_run=True)
    assert (root / "reserve").exists()


def failing(error: int) -> Callable[..., Any]:
    def fails(*args: object, **options: object) -> None:
        raise OSError(error, os.strerror(error), "/secret/path")

    return fails


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (5, StorageFailed)]
)
def test_errors_of_the_disk_are_storage_errors(
    error: int, kind: type[StorageFailed], registry: Registry, root: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where, name in ((blobs, "sync"), (stage, "sync"), (blobs.os, "rename"), (Path, "mkdir"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing(error))
            with pytest.raises(AdapterError) as refusal:
                registry.stage_folder(other)
        assert type(refusal.value) is kind, name
        assert os.strerror(error) in refusal.value.message
        assert "secret" not in refusal.value.message
    assert on_disk(root) == {registry.get("a").digest}


def test_a_defect_of_ours_is_not_blamed_on_the_disk(registry: Registry) -> None:
    with pytest.raises(sqlite3.OperationalError), registry._db.transaction():
        registry._db.run("INSERT INTO nothing VALUES (1)")
    with suppress(ZeroDivisionError), registry._db.transaction():
        registry._db.run("DELETE FROM versions")
        _ = 1 / 0
    assert registry.get("a").version == 1


def test_a_source_that_cannot_be_read_is_the_sources_fault(
    registry: Registry, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.os, "open", failing(errno.EACCES))
    with pytest.raises(AdapterRejected, match="cannot be read: Permission denied"):
        registry.stage_folder(other)


def test_a_blob_whose_folder_was_not_synced_is_taken_back(
    registry: Registry, root: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next push of the same content would find it and trust it."""
    real = blobs.sync
    monkeypatch.setattr(blobs, "sync", lambda path: failing(5)() if path.name == "blobs" else real(path))
    with pytest.raises(StorageFailed):
        push(registry, "b", other)
    assert on_disk(root) == {registry.get("a").digest}


def test_a_damaged_blob_is_replaced_by_the_next_push(registry: Registry, root: Path, adapter: Path) -> None:
    entry = registry.get("a")
    (entry.path / "adapter_model.safetensors").unlink()
    assert push(registry, "a", adapter) == entry
    assert (entry.path / "adapter_model.safetensors").is_file()
    assert on_disk(root) == {entry.digest}


def test_a_delete_holds_though_its_files_stay(registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.get("a")
    with monkeypatch.context() as patch:
        patch.setattr(blobs.os, "rename", failing(5))
        patch.setattr(storage.shutil, "rmtree", failing(5))
        assert registry.delete("a").unused == [entry.digest]
    assert entry.path.is_dir()
    assert registry.list().entries == ()
    report = registry.gc(keep=None, dry_run=False)
    assert report.blobs == (entry.digest,)
    assert on_disk(root) == set()


def test_start_up_does_not_take_a_failing_disk_for_lost_blobs(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.close()
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "served_files", failing(5))
        with pytest.raises(StorageFailed, match="Input/output"):
            Registry(root, "base")
    registry = Registry(root, "base")
    assert registry.recovered == []
    assert registry.get("a").version == 1
    registry.close()


def test_start_up_does_not_take_a_missing_disk_for_lost_blobs(registry: Registry, root: Path) -> None:
    registry.close()
    (root / "blobs").rename(root / "elsewhere")
    for _ in range(2):
        with pytest.raises(StorageFailed, match="mounted"):
            Registry(root, "base")
    (root / "elsewhere").rename(root / "blobs")
    registry = Registry(root, "base")
    assert registry.get("a").version == 1
    registry.close()


def test_a_file_that_is_no_database(root: Path) -> None:
    root.mkdir()
    (root / "registry.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(StorageFailed, match="not a database"):
        Registry(root, "base")


def test_a_disk_without_a_write_ahead_log_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = sqlite3.connect(":memory:")
    monkeypatch.setattr(database.sqlite3, "connect", lambda *args, **options: in_memory)
    with pytest.raises(StorageFailed, match="write-ahead"):
        Registry(root, "base")
