"""What tests of the registry share."""

from __future__ import annotations

from pathlib import Path

from onebase.adapters.registry import AdapterEntry, Registry
from onebase.adapters.registry.blobs import Blob, Stage

TENSORS = "adapter_model.safetensors"


def commit(registry: Registry, name: str, blob: Blob) -> AdapterEntry:
    return registry.commit(name, blob, "test", family=blob.family, rank=4, nbytes=blob.nbytes)


def push(registry: Registry, name: str, path: Path) -> AdapterEntry:
    return commit(registry, name, registry.stage_folder(path))


def upload(stage: Stage, path: Path) -> None:
    for file in path.iterdir():
        with stage.open(file.name) as writer:
            writer.write(file.read_bytes())


def on_disk(root: Path) -> set[str]:
    """The blobs; and nothing is left of any upload."""
    assert list((root / "staging").iterdir()) == []
    return {folder.name for folder in (root / "blobs").iterdir()}
