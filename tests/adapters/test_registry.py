"""Names, versions and references of one base; two bases; threads."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound
from onebase.adapters.registry import Registry

from .conftest import edit_tensors
from .registry_helpers import TENSORS, on_disk, push, upload


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
        lambda: registry.change("b", pinned=True),
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
    assert registry.change("a", pinned=True).pinned
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


def test_two_servers_cannot_share_a_folder(registry: Registry, root: Path) -> None:
    with pytest.raises(AdapterConflict, match="another server"):
        Registry(root, "base")
    registry.close()
    Registry(root, "base").close()


def test_threads(root: Path, registry: Registry, adapter: Path, tmp_path: Path) -> None:
    folders = []
    for index in range(4):
        folder = tmp_path / f"variant{index}"
        shutil.copytree(adapter, folder)
        edit_tensors(folder, lambda tensors, scale=index + 1: [tensor.mul_(scale) for tensor in tensors.values()])
        folders.append(folder)
    barrier = threading.Barrier(4)
    push(registry, "n1", folders[0])

    def work(worker: int) -> list[int]:
        barrier.wait()
        versions = []
        for turn in range(6):
            versions.append(push(registry, f"n{(worker + turn) % 2}", folders[(worker + turn) % 4]).version)
            registry.discard(registry.stage_folder(folders[turn % 4]))
            held, ticket = registry.hold("n1")
            assert (held.path / TENSORS).is_file()
            registry.release(ticket)
            if worker == 1:
                registry.gc(keep=turn % 3, dry_run=False)
            if worker == 0 and turn % 2:
                registry.delete("n0")
                push(registry, "n0", folders[0])
        return versions

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    entries = [entry for name in ("n0", "n1") for entry in registry.versions(name)]
    assert len({(entry.name, entry.version) for entry in entries}) == len(entries)
    assert on_disk(root) == {entry.digest for entry in entries}


def test_references(registry: Registry, adapter: Path, other: Path) -> None:
    first, second = push(registry, "a", adapter), push(registry, "a", other)
    third = push(registry, "a", adapter)
    assert registry.get(f"a@sha256:{second.digest}") == registry.get(f"a@sha256:{second.digest[:12]}") == second
    assert registry.get(f"a@sha256:{first.digest}") == third, "of equal versions the current one"
    registry.rollback("a", 1)
    assert registry.get(f"a@sha256:{first.digest}") == first
    registry.rollback("a", 2)
    assert registry.get(f"a@sha256:{first.digest}") == third, "else the newest"
    push(registry, "b", adapter)
    for missing in (f"b@sha256:{second.digest}", "a@sha256:" + "0" * 12, f"c@sha256:{first.digest}"):
        with pytest.raises(AdapterNotFound):
            registry.get(missing)
    entry, ticket = registry.hold(f"a@sha256:{first.digest[:20]}")
    assert entry == third
    registry.release(ticket)


def test_a_digest_that_could_mean_two_versions_means_none(registry: Registry, adapter: Path, other: Path) -> None:
    push(registry, "a", adapter)
    push(registry, "a", other)
    for version in (1, 2):
        with registry._db.transaction():
            registry._db.run("UPDATE versions SET digest = ? WHERE version = ?", "0" * 63 + str(version), version)
    with pytest.raises(AdapterNotFound):
        registry.get("a@sha256:" + "0" * 63)
    assert registry.get("a@sha256:" + "0" * 63 + "1").version == 1


def test_where_a_version_came_from(registry: Registry, adapter: Path) -> None:
    blob = registry.stage_folder(adapter)
    made = {"family": "LORA", "rank": 4, "nbytes": 1}
    entry = registry.commit("a", blob, "hf:x/y", revision="abc123", by="ci", **made)  # type: ignore[arg-type]
    assert (entry.source, entry.revision, entry.created_by) == ("hf:x/y", "abc123", "ci")
    assert registry.get("a") == entry


def test_rollback_without_a_version_goes_back(registry: Registry, adapter: Path, other: Path) -> None:
    push(registry, "a", adapter)
    with pytest.raises(AdapterNotFound, match="no other version"):
        registry.rollback("a", None)
    push(registry, "a", other)
    push(registry, "a", adapter)
    assert registry.rollback("a", 1).version == 1
    assert registry.rollback("a", None).version == 3, "the one that was current before"
    assert registry.rollback("a", None).version == 1, "and back"
    assert [entry.version for entry in registry.gc(keep=0, dry_run=False).versions] == [2]
    assert registry.rollback("a", None).version == 3, "no collection takes what it goes back to"
    push(registry, "a", other)
    push(registry, "a", adapter)
    registry.gc(keep=1, dry_run=False)
    assert [entry.version for entry in registry.versions("a")] == [4, 5]
    push(registry, "b", adapter)
    push(registry, "b", other)
    registry.rollback("b", 2)
    assert registry.rollback("b", None).version == 1, "to the current one is no step"


def test_rollback_falls_to_the_next_lower_where_the_one_before_is_unknown(
    registry: Registry, adapter: Path, other: Path
) -> None:
    for folder in (adapter, other, adapter):
        push(registry, "a", folder)
    with registry._db.transaction():  # as of a name that an older OneBase has left
        registry._db.run("UPDATE names SET previous = NULL")
    assert registry.rollback("a", None).version == 2


def test_pages(registry: Registry, adapter: Path) -> None:
    names = sorted(f"{start}{index:02}" for start in ("A", "a", "a-", "b", "z") for index in range(7))
    for name in names:
        push(registry, name, adapter)
    registry.delete("a03")
    names.remove("a03")

    def walk(**filters: Any) -> list[str]:
        found: list[str] = []
        after: str | None = None
        while True:
            page = registry.list(after=after, limit=4, **filters)
            found += [entry.name for entry in page.entries]
            assert len(page.entries) == 4 or page.next is None
            if page.next is None:
                return found
            assert page.next == found[-1]
            after = page.next

    assert walk() == names
    assert walk(prefix="a") == [name for name in names if name.startswith("a")]
    assert walk(prefix="a-") == [name for name in names if name.startswith("a-")]
    for nothing in ("%", "_", "a_", "é", "c"):
        assert walk(prefix=nothing) == []
    for name in names[::3]:
        registry.change(name, pinned=True)
        registry.change(name, labels={"team": "x", "even": str(names.index(name) % 2)})
    assert walk(pinned=True) == names[::3] == [entry.name for entry in registry.pinned()]
    assert walk(pinned=False) == [name for name in names if name not in names[::3]]
    assert walk(labels={"team": "x"}) == names[::3]
    assert walk(labels={"team": "x", "even": "0"}) == names[::6]
    assert walk(labels={"team": "y"}) == walk(labels={"other": "x"}) == []
    assert walk(labels={"team": "x"}, prefix="b", pinned=True) == [n for n in names[::3] if n.startswith("b")]
    assert registry.list(after="a02", limit=1).entries[0].name == "a04", "a page goes on behind what is gone"
    assert registry.list(limit=len(names)).next is None
    assert registry.count() == len(names)


def test_names_of_digests(registry: Registry, adapter: Path, other: Path) -> None:
    first = push(registry, "b", adapter)
    push(registry, "a", adapter)
    second = push(registry, "c", other)
    assert registry.names_of([]) == {}
    assert registry.names_of([first.digest, second.digest, "0" * 64]) == {
        first.digest: ("a", "b"),
        second.digest: ("c",),
    }
    push(registry, "a", other)
    assert registry.names_of([first.digest]) == {first.digest: ("b",)}, "of current versions only"


def test_deleted_names_are_remembered(registry: Registry, adapter: Path, other: Path) -> None:
    for name in ("a", "b", "c"):
        push(registry, name, adapter)
    push(registry, "b", other)
    assert registry.deleted() == ()
    registry.delete("b")
    registry.delete("c")
    b, c = registry.deleted()
    assert (b.name, b.last, c.name, c.last) == ("b", 2, "c", 1)
    assert b.deleted is not None
    assert abs(b.deleted - time.time()) < 60
    assert registry.deleted(limit=1) == (b,)
    assert registry.deleted(after="b") == (c,)
    assert push(registry, "b", adapter).version == 3
    assert registry.deleted() == (c,)
