"""What a collection removes: old versions, finished imports, and folders that nobody refers to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onebase.adapters.registry.blobs import BlobStore
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterEntry
from onebase.adapters.registry.queries import Queries

_OLD = """
 AND v.version <> n.current
 AND NOT EXISTS (SELECT 1 FROM aliases WHERE base = v.base AND name = v.name AND version = v.version)
 AND (SELECT COUNT(*) FROM versions w WHERE w.base = v.base AND w.name = v.name AND w.version > v.version) >= ?
 ORDER BY v.name, v.version
"""


@dataclass(frozen=True, slots=True)
class Rubbish:
    """Folders without a use: digests of blobs, digests of compiled forms, names in staging/; and their bytes."""

    blobs: tuple[str, ...]
    compiled: tuple[str, ...]
    staging: tuple[str, ...]
    nbytes: int


def old_versions(read: Queries, blobs: BlobStore, keep: int | None) -> tuple[AdapterEntry, ...]:
    """Beyond each name's newest ``keep`` (None: all are kept), and neither current, nor aliased, nor held."""
    if keep is None:
        return ()
    held = blobs.held()
    return tuple(entry for entry in read.entries(_OLD, keep) if entry.digest not in held)


def rubbish(db: Database, blobs: BlobStore, going: Sequence[AdapterEntry]) -> Rubbish:
    """What will have no version of any base, and no hold, once the versions that are going are gone."""
    versions = Counter(dict(db.rows("SELECT digest, COUNT(*) FROM versions GROUP BY digest")))
    versions.subtract(entry.digest for entry in going)
    there = blobs.digests()
    unneeded = {digest for digest in there - blobs.held() if versions[digest] <= 0}
    compiled = blobs.compiled() - (there - unneeded)
    nbytes = sum(blobs.nbytes(digest) for digest in unneeded | compiled)
    return Rubbish(tuple(sorted(unneeded)), tuple(sorted(compiled)), tuple(sorted(blobs.leftovers())), nbytes)


def sweep_away(blobs: BlobStore, found: Rubbish) -> None:
    """The caller holds the registry's lock."""
    for digest in {*found.blobs, *found.compiled}:
        blobs.remove(digest)
    for name in found.staging:
        blobs.remove_leftover(name)


def without_a_name(db: Database, base: str, going: Sequence[AdapterEntry]) -> tuple[str, ...]:
    """Digests that no version of this base will have once the versions that are going, which nobody holds, are gone."""
    versions = Counter(dict(db.rows("SELECT digest, COUNT(*) FROM versions WHERE base = ? GROUP BY digest", base)))
    versions.subtract(entry.digest for entry in going)
    return tuple(sorted({entry.digest for entry in going if versions[entry.digest] <= 0}))
