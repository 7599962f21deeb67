"""What a collection removes and what it spares; a dry run says the same and removes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onebase.adapters.registry import AdapterState, GcReport, Registry

from .conftest import edit_tensors
from .registry_helpers import on_disk, push


@pytest.fixture
def folders(adapter: Path, tmp_path: Path) -> list[Path]:
    """Five adapters."""
    made = []
    for index in range(5):
        folder = tmp_path / f"folder{index}"
        shutil.copytree(adapter, folder)
        edit_tensors(folder, lambda tensors, scale=index + 1: [tensor.mul_(scale) for tensor in tensors.values()])
        made.append(folder)
    return made


def collect(registry: Registry, keep: int | None) -> GcReport:
    """A dry run, which changes nothing, then a real one, which does what the dry run said."""
    before = registry.list(), registry.imports()
    said = registry.gc(keep=keep, dry_run=True)
    assert (registry.list(), registry.imports()) == before
    done = registry.gc(keep=keep, dry_run=False)
    assert done == said
    again = registry.gc(keep=keep, dry_run=False)
    assert again == GcReport((), 0, (), (), 0, ())
    return done


def numbers(report: GcReport) -> list[tuple[str, int]]:
    return [(entry.name, entry.version) for entry in report.versions]


def test_old_versions_go_unless_somebody_needs_them(registry: Registry, root: Path, folders: list[Path]) -> None:
    entries = [push(registry, "a", folder) for folder in folders]
    push(registry, "b", folders[4])
    registry.change("a", aliases={"stable": 1})
    _, ticket = registry.hold("a@3")
    registry.rollback("a", 2)
    assert numbers(collect(registry, 10)) == numbers(collect(registry, 5)) == []
    assert numbers(collect(registry, 0)) == [("a", 4)], "1 is aliased, 2 current, 3 held, 5 was current before"
    registry.rollback("a", 1)
    registry.rollback("a", 2)
    assert numbers(collect(registry, 1)) == [], "5 is the newest"
    report = collect(registry, 0)
    assert numbers(report) == [("a", 5)]
    assert (report.blobs, report.unused) == ((), ()), "b has its content"
    registry.release(ticket)
    report = collect(registry, 0)
    assert numbers(report) == [("a", 3)]
    assert report.blobs == report.unused == (entries[2].digest,)
    assert report.nbytes == sum(file.stat().st_size for file in folders[2].iterdir())
    assert on_disk(root) == {entries[index].digest for index in (0, 1, 4)}


def test_without_a_number_versions_stay(registry: Registry, folders: list[Path]) -> None:
    for folder in folders:
        push(registry, "a", folder)
    assert collect(registry, None) == GcReport((), 0, (), (), 0, ())
    assert len(registry.versions("a")) == 5


def test_finished_imports_go(registry: Registry) -> None:
    states = [AdapterState.FAILED, AdapterState.READY, AdapterState.CHECKING]
    for name, state in zip("abc", states, strict=True):
        registry.set_import(registry.begin_import(name, "hf:x/y", None, "").id, state)
    assert collect(registry, None).imports == 2
    assert [item.name for item in registry.imports()] == ["c"]


def test_folders_that_nobody_needs_go(registry: Registry, root: Path, folders: list[Path]) -> None:
    kept = push(registry, "a", folders[0])
    staged = registry.stage_folder(folders[1])
    for digest in (kept.digest, staged.digest, "f" * 64):
        (root / "compiled" / digest / "base").mkdir(parents=True)
        (root / "compiled" / digest / "base" / "1.safetensors").write_bytes(b"12345")
    (root / "blobs" / ("e" * 64)).mkdir()
    (root / "staging" / "left").mkdir()
    with registry.stage() as stage:
        with stage.open("adapter_config.json") as file:
            file.write(b"{}")
        report = collect(registry, 0)
        assert (report.blobs, report.compiled, report.nbytes) == (("e" * 64,), ("f" * 64,), 5)
        with stage.open("adapter_model.safetensors") as file:
            file.write(b"x")
    assert {folder.name for folder in (root / "compiled").iterdir()} == {kept.digest, staged.digest}
    registry.discard(staged)
    assert {folder.name for folder in (root / "compiled").iterdir()} == {kept.digest}, "a blob takes its forms along"
    assert on_disk(root) == {kept.digest}


def test_other_bases_are_spared(root: Path, folders: list[Path]) -> None:
    for base in ("one", "two"):
        registry = Registry(root, base)
        first, *others = [push(registry, "a", folder) for folder in folders[:3]]
        registry.set_import(registry.begin_import("x", "hf:x/y", None, "").id, AdapterState.FAILED)
        registry.close()
    registry = Registry(root, "two")
    report = registry.gc(keep=1, dry_run=False)
    registry.close()
    assert (len(report.versions), report.imports, report.blobs, report.unused) == (1, 1, (), (first.digest,))
    registry = Registry(root, "one")
    kept = [entry.version for entry in registry.versions("a")], len(registry.imports())
    registry.close()
    assert kept == ([1, 2, 3], 1)
    assert on_disk(root) == {first.digest, *(entry.digest for entry in others)}


def test_start_up_sweeps_compiled_forms(root: Path, folders: list[Path]) -> None:
    registry = Registry(root, "base")
    kept = push(registry, "a", folders[0])
    registry.close()
    for digest in (kept.digest, "f" * 64):
        (root / "compiled" / digest / "base").mkdir(parents=True)
    registry = Registry(root, "base")
    assert registry.recovered == [f"removed compiled/{'f' * 64}: no version refers to it"]
    assert {folder.name for folder in (root / "compiled").iterdir()} == {kept.digest}
    registry.close()
