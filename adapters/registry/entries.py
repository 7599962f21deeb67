"""What the registry hands out: versions, pages of them, imports, and what a deletion or a collection removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class AdapterState(StrEnum):
    """Where a name stands. Versions are READY, always; FETCHING, CHECKING and FAILED belong to imports.

    DELETED: of a name that is gone, and of its imports.
    """

    FETCHING = "fetching"
    CHECKING = "checking"
    READY = "ready"
    FAILED = "failed"
    DELETED = "deleted"

    @property
    def finished(self) -> bool:
        return self not in (AdapterState.FETCHING, AdapterState.CHECKING)


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One version of one name. nbytes: on the device; created: seconds since the epoch.

    source, revision and created_by: where the files came from, at which commit, and who asked.
    pinned, labels and aliases are the name's, whatever the version.
    """

    name: str
    version: int
    digest: str
    path: Path
    family: str
    rank: int
    nbytes: int
    source: str
    revision: str | None
    created: float
    created_by: str
    pinned: bool
    labels: Mapping[str, str]
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Some entries by name. ``next``: what to pass as ``after`` for the following page; None at the end."""

    entries: tuple[AdapterEntry, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Deletion:
    """The versions that went, by their digests too.

    orphans: digests that no version of this base has any more; unused: those of them that nobody holds either.
    """

    entries: list[AdapterEntry]
    orphans: list[str]
    unused: list[str]


@dataclass(frozen=True, slots=True)
class DeletedName:
    """What is left of a deleted name. Its numbers go on behind ``last``. deleted: seconds since the epoch, if known."""

    name: str
    last: int
    deleted: float | None


@dataclass(frozen=True, slots=True)
class Import:
    """A source on its way to a version of a name. ``reason``: why it failed; ``version``: once it is ready."""

    id: str
    name: str
    source: str
    revision: str | None
    state: AdapterState
    reason: str
    created: float
    by: str
    version: int | None


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection removed, or would have: versions, finished imports, and folders of the data folder.

    blobs and compiled are digests. nbytes: on the disk. unused: digests that this base has no use for any more, which
    an engine may still have on the device.
    """

    versions: tuple[AdapterEntry, ...]
    imports: int
    blobs: tuple[str, ...]
    compiled: tuple[str, ...]
    nbytes: int
    unused: tuple[str, ...]
