"""What is removed because nobody needs it: old versions, finished imports, and folders that nobody refers to.

Folders go in small steps: the registry's lock is held for some removals at a time, and never while files are measured
or deleted, so that requests, which need it too, are not held up by a large collection.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from onebase.adapters.errors import StorageFailed
from onebase.adapters.registry.blobs import BlobStore
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterEntry
from onebase.adapters.registry.queries import Queries

log = logging.getLogger("onebase.adapters")

AT_ONCE = 50  # removals for which the registry's lock is held

_OLD = """
 AND v.version <> n.current AND v.version IS NOT n.previous
 AND NOT EXISTS (SELECT 1 FROM aliases WHERE base = v.base AND name = v.name AND version = v.version)
 AND (v.base, v.name, v.version) IN (
    SELECT base, name, version
    FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY base, name ORDER BY version DESC) AS place FROM versions)
    WHERE place > ?
 )
 ORDER BY v.name, v.version
"""


@dataclass(frozen=True, slots=True)
class Rubbish:
    """Folders without a use: digests of blobs, digests of compiled forms, and names in staging/."""

    blobs: tuple[str, ...]
    compiled: tuple[str, ...]
    staging: tuple[str, ...] = ()

    @property
    def digests(self) -> list[str]:
        return sorted({*self.blobs, *self.compiled})

    def of(self, digests: set[str]) -> Rubbish:
        """What of it belongs to some digests."""
        return Rubbish(
            tuple(digest for digest in self.blobs if digest in digests),
            tuple(digest for digest in self.compiled if digest in digests),
        )


class Sweeper:
    """Removes folders that nobody needs, of one base or of all. Its methods are called without the registry's lock.

    A change that led here holds, so nothing is raised: what the disk refuses goes with the next gc or start. So do
    blobs whose version may turn out to hold.
    """

    def __init__(self, db: Database, base: str, blobs: BlobStore) -> None:
        self._db = db
        self._base = base
        self._blobs = blobs

    def collect(self, digests: Iterable[str]) -> list[str]:
        """Those that this base has no use for. Blobs that no version of any base refers to are removed."""
        unused: list[str] = []
        for some in _batches(digests):
            try:
                with self._db.lock:
                    unused += [digest for digest in some if self._is_unused(digest)]
            except StorageFailed as error:
                self._put_off(error)
                break
            self._blobs.empty_trash()
        return unused

    def measure(self, found: Rubbish) -> int:
        """Bytes on the disk. Raises StorageFailed."""
        return sum(map(self._blobs.nbytes, found.digests))

    def sweep(self, found: Rubbish) -> tuple[Rubbish, int]:
        """Removes what is still rubbish; returns that, and its bytes."""
        gone, nbytes = set[str](), 0
        for some in _batches(found.digests):
            try:
                sizes = {digest: self._blobs.nbytes(digest) for digest in some}
                with self._db.lock:
                    removed = [digest for digest in some if self._removed(digest)]
            except StorageFailed as error:
                self._put_off(error)
                break
            self._blobs.empty_trash()
            gone.update(removed)
            nbytes += sum(sizes[digest] for digest in removed)
        for name in found.staging:
            self._blobs.remove_leftover(name)
        return found.of(gone), nbytes

    def _is_unused(self, digest: str) -> bool:
        if self._db.uncertain or self._blobs.is_held(digest):
            return False
        bases = {row[0] for row in self._db.rows("SELECT DISTINCT base FROM versions WHERE digest = ?", digest)}
        return self._base not in bases and (bool(bases) or self._blobs.remove(digest))

    def _removed(self, digest: str) -> bool:
        if self._db.uncertain or self._db.rows("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", digest):
            return False
        return self._blobs.remove(digest)

    def _put_off(self, error: StorageFailed) -> None:
        log.warning("blobs that nobody needs are left to the next gc or start: %s", error.message)


def old_versions(read: Queries, blobs: BlobStore, keep: int | None) -> tuple[AdapterEntry, ...]:
    """Beyond each name's newest ``keep`` (None: all), and neither current, nor before that, nor aliased, nor held."""
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
    return Rubbish(tuple(sorted(unneeded)), tuple(sorted(compiled)), tuple(sorted(blobs.leftovers())))


def without_a_name(db: Database, base: str, going: Sequence[AdapterEntry]) -> tuple[str, ...]:
    """Digests that no version of this base will have once the versions that are going, which nobody holds, are gone."""
    versions = Counter(dict(db.rows("SELECT digest, COUNT(*) FROM versions WHERE base = ? GROUP BY digest", base)))
    versions.subtract(entry.digest for entry in going)
    return tuple(sorted({entry.digest for entry in going if versions[entry.digest] <= 0}))


def _batches(digests: Iterable[str]) -> Iterator[list[str]]:
    left = iter(digests)
    while some := list(islice(left, AT_ONCE)):
        yield some
