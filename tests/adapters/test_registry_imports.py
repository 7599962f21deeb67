"""Imports: one of a name at a time, through their states, over a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from onebase.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound
from onebase.adapters.registry import AdapterState, Import, Registry

from .registry_helpers import push


def begin(registry: Registry, name: str = "a", source: str = "hf:x/y", revision: str | None = None) -> Import:
    return registry.begin_import(name, source, revision, "me")


def test_the_way_of_an_import(registry: Registry, adapter: Path) -> None:
    made = begin(registry, revision="main")
    assert (made.name, made.source, made.revision, made.state) == ("a", "hf:x/y", "main", AdapterState.FETCHING)
    assert (made.reason, made.by, made.version) == ("", "me", None)
    assert registry.last_import("a") == made
    assert registry.imports() == registry.imports(unfinished=True) == (made,)
    registry.set_import(made.id, AdapterState.CHECKING)
    entry = registry.commit("a", registry.stage_folder(adapter), "hf:x/y", family="LORA", rank=4, nbytes=1, job=made.id)
    done = registry.last_import("a")
    assert done is not None
    assert (done.id, done.state, done.version) == (made.id, AdapterState.READY, entry.version)
    assert registry.imports(unfinished=True) == ()
    assert registry.last_import("b") is None


def test_a_failure_says_why_and_the_next_try_is_another_import(registry: Registry) -> None:
    first = begin(registry)
    registry.set_import(first.id, AdapterState.FAILED, "no route to host")
    second = begin(registry)
    assert second.id != first.id
    assert [item.id for item in registry.imports()] == [second.id, first.id], "newest first"
    assert registry.imports()[1].reason == "no route to host"
    assert registry.imports(limit=1) == (second,)


def test_one_source_of_a_name_at_a_time(registry: Registry) -> None:
    first = begin(registry)
    assert begin(registry) == first, "the same again is the one under way"
    for source, revision in (("hf:x/z", None), ("hf:x/y", "v2")):
        with pytest.raises(AdapterConflict, match="hf:x/y"):
            begin(registry, source=source, revision=revision)
    assert begin(registry, "b", "hf:x/z").id != first.id
    registry.set_import(first.id, AdapterState.FAILED, "gone")
    assert begin(registry, source="hf:x/z").source == "hf:x/z"


def test_what_is_finished_stays_so(registry: Registry) -> None:
    made = begin(registry)
    registry.set_import(made.id, AdapterState.READY, version=1)
    with pytest.raises(AdapterConflict, match="ready already"):
        registry.set_import(made.id, AdapterState.FAILED, "late")
    with pytest.raises(AdapterNotFound):
        registry.set_import("nothing", AdapterState.FAILED)
    with pytest.raises(AdapterNameInvalid):
        begin(registry, "../a")


def test_a_commit_that_fails_leaves_its_import_open(registry: Registry, adapter: Path) -> None:
    made = begin(registry)
    registry.set_import(made.id, AdapterState.FAILED, "stopped")
    blob = registry.stage_folder(adapter)
    with pytest.raises(AdapterConflict):
        registry.commit("a", blob, "hf:x/y", family="LORA", rank=4, nbytes=1, job=made.id)
    assert registry.count() == 0, "no version without its import"
    registry.discard(blob)


def test_a_restart_goes_on_with_what_was_under_way(root: Path) -> None:
    registry = Registry(root, "base")
    fetching, checking, failed = begin(registry, "a"), begin(registry, "b"), begin(registry, "c")
    registry.set_import(checking.id, AdapterState.CHECKING)
    registry.set_import(failed.id, AdapterState.FAILED, "why")
    registry.close()
    registry = Registry(root, "base")
    assert registry.recovered == ["the import of b from hf:x/y begins again"]
    states = {item.id: item.state for item in registry.imports()}
    assert states == {fetching.id: "fetching", checking.id: "fetching", failed.id: "failed"}
    registry.close()
    registry = Registry(root, "another base")
    assert registry.imports() == ()
    registry.close()


def test_there_may_be_very_many(registry: Registry) -> None:
    with registry._db.transaction():  # one sync for all
        made = [registry._imports.begin(f"a{index:04}", "hf:x/y", None, "me") for index in range(1010)]
    assert len(registry.imports(unfinished=True)) == 1010
    assert registry.find_import(made[0].id) == made[0]
    assert registry.find_import("nothing") is None
    assert registry.under_way(["a0003", "a0001", "b"]) == (made[1], made[3])


def test_pages_of_last_imports(registry: Registry) -> None:
    for name in ("b", "a", "ab", "c", "d"):
        registry.set_import(begin(registry, name).id, AdapterState.FAILED, "why")
    begin(registry, "b")
    assert [job.name for job in registry.last_imports(AdapterState.FAILED)] == ["a", "ab", "c", "d"]
    assert [job.name for job in registry.last_imports(AdapterState.FETCHING)] == ["b"]
    assert [job.name for job in registry.last_imports(AdapterState.FAILED, after="a", limit=2)] == ["ab", "c"]
    assert [job.name for job in registry.last_imports(AdapterState.FAILED, prefix="a")] == ["a", "ab"]


def test_a_delete_ends_imports_and_what_failed_goes_too(registry: Registry, adapter: Path) -> None:
    running = begin(registry)
    assert registry.delete("a").entries == []
    blob = registry.stage_folder(adapter)
    with pytest.raises(AdapterConflict, match="deleted already"):
        registry.commit("a", blob, "hf:x/y", family="LORA", rank=4, nbytes=1, job=running.id)
    registry.discard(blob)
    assert (registry.count(), registry.deleted()) == (0, ())
    with pytest.raises(AdapterConflict, match="deleted already"):
        registry.check_import(running.id)
    registry.set_import(begin(registry).id, AdapterState.FAILED, "why")
    assert registry.delete("a").entries == []
    with pytest.raises(AdapterNotFound, match="no adapter 'a'"):
        registry.delete("a")


def test_deleting_a_name_marks_the_imports_that_made_it(registry: Registry, adapter: Path) -> None:
    made = begin(registry)
    push(registry, "a", adapter)
    registry.set_import(made.id, AdapterState.READY, version=1)
    under_way = begin(registry)
    registry.delete("a")
    assert [(item.id, item.state) for item in registry.imports()] == [
        (under_way.id, "deleted"),
        (made.id, "deleted"),
    ]
