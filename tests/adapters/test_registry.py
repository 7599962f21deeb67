"""The registry keeps what it acknowledged, through refusals, crashes and threads."""

from __future__ import annotations

import itertools
import os
import pkgutil
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from onebase.adapters.blobs import Blob, Stage
from onebase.adapters.errors import (
    AdapterConflict,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRejected,
    AdapterTooLarge,
)
from onebase.adapters.registry import AdapterEntry, Registry

from .conftest import edit_tensors

TENSORS = "adapter_model.safetensors"


Step: TypeAlias = tuple[str, str, int]


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    registry = Registry(root, "base")
    yield registry
    registry.close()


@pytest.fixture
def other(adapter: Path, tmp_path: Path) -> Path:
    """Another sound adapter."""
    path = tmp_path / "other"
    shutil.copytree(adapter, path)
    edit_tensors(path, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    return path


def commit(registry: Registry, name: str, blob: Blob) -> AdapterEntry:
    return registry.commit(name, blob, "test", family=blob.family, rank=4, nbytes=blob.nbytes)


def push(registry: Registry, name: str, path: Path) -> AdapterEntry:
    return commit(registry, name, registry.stage_folder(path))


def upload(stage: Stage, path: Path) -> None:
    for file in path.iterdir():
        with stage.open(file.name) as writer:
            writer.write(file.read_bytes())


def on_disk(root: Path) -> set[str]:
    assert list((root / "staging").iterdir()) == []
    return {folder.name for folder in (root / "blobs").iterdir()}


def test_an_upload_becomes_an_entry(registry: Registry, root: Path, adapter: Path) -> None:
    (adapter / "README.md").write_text("ignored")
    with registry.stage() as stage:
        upload(stage, adapter)
        blob = stage.finish()
    assert registry.list().entries == ()
    entry = registry.commit("a", blob, "upload", family="LORA", rank=4, nbytes=77)
    assert (entry.name, entry.version, entry.digest, entry.path) == ("a", 1, blob.digest, root / "blobs" / blob.digest)
    assert (entry.family, entry.rank, entry.nbytes, entry.source, entry.pinned) == ("LORA", 4, 77, "upload", False)
    assert sorted(file.name for file in entry.path.iterdir()) == ["adapter_config.json", TENSORS]
    assert (entry.path / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    assert registry.get("a") == registry.get("a@1") == entry
    assert list(registry.list().entries) == registry.versions("a") == [entry]
    assert on_disk(root) == {entry.digest}


def test_the_digest_is_of_names_and_content_only(registry: Registry, adapter: Path, other: Path) -> None:
    first = registry.stage_folder(adapter)
    (adapter / "README.md").write_text("not part of it")
    assert registry.stage_folder(adapter).digest == first.digest
    assert registry.stage_folder(other).digest != first.digest
    (adapter / TENSORS).rename(adapter / "renamed.safetensors")
    assert registry.stage_folder(adapter).digest != first.digest


def test_versions_rollback_and_delete(registry: Registry, root: Path, adapter: Path, other: Path) -> None:
    first, second = push(registry, "a", adapter), push(registry, "a", other)
    assert push(registry, "a", other) == second
    assert [entry.version for entry in registry.versions("a")] == [1, 2]
    assert registry.get("a") == second
    assert registry.rollback("a", 1) == registry.get("a") == first
    assert push(registry, "a", other).version == 3, "what is not current is a new version"
    assert push(registry, "b", other).version == 1

    gone = registry.delete("a")
    assert [entry.version for entry in gone.entries] == [1, 2, 3]
    assert gone.unused == [first.digest]
    assert on_disk(root) == {second.digest}, "b still refers to it"
    for missing in ("a", "a@1"):
        with pytest.raises(AdapterNotFound):
            registry.get(missing)
    assert push(registry, "a", adapter).version == 4, "numbers are not used again"
    registry.delete("b")
    assert on_disk(root) == {first.digest}


def test_what_is_missing_is_not_found(registry: Registry, adapter: Path) -> None:
    push(registry, "a", adapter)
    calls: list[Callable[[], object]] = [
        lambda: registry.get("b"),
        lambda: registry.get("a@2"),
        lambda: registry.versions("b"),
        lambda: registry.delete("b"),
        lambda: registry.rollback("a", 2),
        lambda: registry.pin("b", True),
    ]
    for call in calls:
        with pytest.raises(AdapterNotFound):
            call()
    assert registry.get("a").version == 1
    for call in (lambda: registry.get("../a"), lambda: registry.delete("a@1"), lambda: registry.rollback("a", -1)):
        with pytest.raises(AdapterNameInvalid):
            call()


def test_pins_survive_new_versions_but_not_deletion(registry: Registry, adapter: Path, other: Path) -> None:
    push(registry, "a", adapter)
    assert registry.pin("a", True).pinned
    assert push(registry, "a", other).pinned
    registry.delete("a")
    assert not push(registry, "a", other).pinned


def test_only_this_base_is_visible(root: Path, adapter: Path) -> None:
    for fingerprint in ("one", "two"):
        registry = Registry(root, fingerprint)
        assert registry.list().entries == ()
        entry = push(registry, "a", adapter)
        assert entry.version == 1
        registry.close()
    registry = Registry(root, "one")
    assert registry.delete("a").unused == [entry.digest], "this base has no use for it any more"
    registry.close()
    registry = Registry(root, "two")
    assert registry.get("a").path.is_dir(), "the blob is shared with the other base"
    registry.close()


BAD_NAMES = ["../adapter_config.json", "a/adapter_config.json", "adapter_config.json\0", "adapter_config.json\n", ""]
BAD_NAMES += ["..", "/etc/passwd", "x" * 5000 + ".safetensors", "adapter_соnfig.json", "a\\b.safetensors", "x.bin", "*"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_file_names_are_refused(name: str, registry: Registry, root: Path) -> None:
    with registry.stage() as stage, pytest.raises(AdapterRejected) as refusal:
        stage.open(name)
    assert len(refusal.value.message) < 700
    assert on_disk(root) == set()


def test_a_file_sent_twice_is_refused(registry: Registry) -> None:
    with registry.stage() as stage:
        with stage.open(TENSORS) as file:
            file.write(b"x")
        with pytest.raises(AdapterRejected, match="twice"):
            stage.open(TENSORS)


def test_uploads_are_bounded(root: Path, adapter: Path) -> None:
    registry = Registry(root, "base", max_bytes=1000)
    with registry.stage() as stage, stage.open("README.md") as readme:
        readme.write(bytes(1000))
        with pytest.raises(AdapterTooLarge, match="1000"):
            readme.write(b"x")
    with pytest.raises(AdapterTooLarge, match="1000"):
        registry.stage_folder(adapter)
    assert on_disk(root) == set()
    registry.close()


def test_a_refused_upload_leaves_nothing(registry: Registry, root: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    with pytest.raises(AdapterRejected, match="NaN"):
        registry.stage_folder(adapter)
    assert on_disk(root) == set()


def test_folders_with_links_are_refused(registry: Registry, root: Path, adapter: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(adapter)
    with pytest.raises(AdapterRejected, match="link"):
        registry.stage_folder(link)
    (adapter / TENSORS).rename(tmp_path / "secret")
    (adapter / TENSORS).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterRejected, match="link"):
        registry.stage_folder(adapter)
    with pytest.raises(AdapterRejected, match="not a folder"):
        registry.stage_folder(tmp_path / "nowhere")
    assert on_disk(root) == set()


def test_discard(registry: Registry, root: Path, adapter: Path) -> None:
    blob, twin = registry.stage_folder(adapter), registry.stage_folder(adapter)
    registry.discard(blob)
    registry.discard(blob)
    assert on_disk(root) == {blob.digest}, "the twin holds it"
    with pytest.raises(AdapterConflict):
        commit(registry, "a", blob)
    with pytest.raises(AdapterNameInvalid):
        commit(registry, "../a", twin)
    entry = commit(registry, "a", twin)
    registry.discard(twin)
    assert entry.path.is_dir()
    last = registry.stage_folder(adapter)
    registry.delete("a")
    assert on_disk(root) == {blob.digest}, "an upload under way holds it"
    registry.discard(last)
    assert on_disk(root) == set()


def test_a_held_version_outlives_its_name_until_the_last_hold_ends(
    registry: Registry, root: Path, adapter: Path
) -> None:
    push(registry, "a", adapter)
    entry, first = registry.hold("a")
    again, second = registry.hold("a@1")
    assert again == entry
    gone = registry.delete("a")
    assert (gone.entries, gone.unused) == ([entry], [])
    with pytest.raises(AdapterNotFound):
        registry.hold("a")
    assert registry.release(first) == []
    assert registry.release(first) == [], "a second time does nothing"
    assert (entry.path / TENSORS).is_file()
    assert registry.release(second) == [entry.digest]
    assert on_disk(root) == set()


def test_releasing_what_is_still_named_removes_nothing(registry: Registry, root: Path, adapter: Path) -> None:
    push(registry, "a", adapter)
    push(registry, "b", adapter)
    entry, ticket = registry.hold("a")
    assert registry.delete("a").unused == []
    assert registry.release(ticket) == []
    assert on_disk(root) == {entry.digest}
    assert registry.delete("b").unused == [entry.digest]


def test_holds_end_with_the_process(root: Path, adapter: Path) -> None:
    registry = Registry(root, "base")
    push(registry, "a", adapter)
    registry.hold("a")
    registry.delete("a")
    registry.close()
    registry = Registry(root, "base")
    assert len(registry.recovered) == 1
    assert on_disk(root) == set()
    registry.close()


def test_two_servers_cannot_share_a_folder(registry: Registry, root: Path) -> None:
    with pytest.raises(AdapterConflict, match="another server"):
        Registry(root, "base")
    registry.close()
    Registry(root, "base").close()


def test_a_newer_schema_is_refused(root: Path) -> None:
    Registry(root, "base").close()
    db = sqlite3.connect(root / "registry.sqlite")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(AdapterConflict, match="schema 9"):
        Registry(root, "base")


BLOBS, PART, REGISTRY = (f"onebase.adapters.{part}" for part in ("blobs", "registry", "registry:Registry"))
# (where, what, which call of it): four syncs make a push durable: two files, their folder, the folder of blobs
PUSH = [(BLOBS, name, 1) for name in ("check_folder", "check_finite", "digest_of")]
PUSH += [(BLOBS, "sync", call) for call in (1, 2, 3, 4)]
PUSH += [(f"{BLOBS}:os", "rename", 1), (BLOBS, "remove", 1)]
PUSH += [(f"{PART}_changes:Changes", "add_version", 1), (f"{PART}_database:Database", "_commit", 1)]
PUSH += [(REGISTRY, "_collect", 1), (f"{PART}_queries:Queries", "_entry", 1)]
DELETE = [(REGISTRY, "_collect", 1), (f"{BLOBS}:os", "rename", 1), (BLOBS, "remove", 1)]


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


def test_threads(root: Path, registry: Registry, adapter: Path, tmp_path: Path) -> None:
    folders = []
    for index in range(4):
        folder = tmp_path / f"variant{index}"
        shutil.copytree(adapter, folder)
        edit_tensors(folder, lambda tensors, scale=index + 1: [tensor.mul_(scale) for tensor in tensors.values()])
        folders.append(folder)
    barrier = threading.Barrier(4)

    def work(worker: int) -> list[int]:
        barrier.wait()
        versions = []
        for turn in range(6):
            versions.append(push(registry, f"n{(worker + turn) % 2}", folders[(worker + turn) % 4]).version)
            registry.discard(registry.stage_folder(folders[turn % 4]))
            assert all(entry.path.is_dir() for entry in registry.list().entries)
            if worker == 0 and turn % 2:
                registry.delete("n0")
                push(registry, "n0", folders[0])
        return versions

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    entries = [entry for name in ("n0", "n1") for entry in registry.versions(name)]
    assert len({(entry.name, entry.version) for entry in entries}) == len(entries)
    assert on_disk(root) == {entry.digest for entry in entries}
