"""What may be staged, who holds a blob, and when it goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onebase.adapters.errors import (
    AdapterConflict,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRejected,
    AdapterTooLarge,
)
from onebase.adapters.registry import Registry

from .conftest import edit_tensors
from .registry_helpers import TENSORS, commit, on_disk, push

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
