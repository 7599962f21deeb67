"""The durable registry: names -> versions -> digest -> blob.

SQLite (WAL, synchronous=FULL) beside content-addressed blob folders. A version is acknowledged when its row is
committed, which is after its blob is durable; a blob is removed after its last row is and its last hold has ended.
So a crash at any point leaves at most blobs without a row, and start-up removes those. Entries belong to a base
model's fingerprint, and only the entries of this base are visible. One process holds the registry; its methods may be
called from any thread.
"""

from __future__ import annotations

import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from onebase.adapters.blobs import DEFAULT_MAX_BYTES, Blob, BlobStore, Stage, copy_folder
from onebase.adapters.errors import AdapterConflict, AdapterNotFound
from onebase.adapters.names import check_name, parse_reference

# names.last outlives the versions, so that a number is never used for two adapters; current is NULL once deleted.
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS names (
    base TEXT NOT NULL, name TEXT NOT NULL, current INTEGER, last INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (base, name)
) STRICT;
CREATE TABLE IF NOT EXISTS versions (
    base TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, family TEXT NOT NULL,
    rank INTEGER NOT NULL, nbytes INTEGER NOT NULL, source TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (base, name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest);
"""
_ENTRY = """
SELECT v.name, v.version, v.digest, v.family, v.rank, v.nbytes, v.source, v.created, n.pinned
FROM versions v JOIN names n USING (base, name) WHERE v.base = ?
"""


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One version of one name. nbytes: on the device; created: seconds since the epoch; pinned: of the name."""

    name: str
    version: int
    digest: str
    path: Path
    family: str
    rank: int
    nbytes: int
    source: str
    created: float
    pinned: bool


Entries: TypeAlias = list[AdapterEntry]
Digests: TypeAlias = list[str]
Lines: TypeAlias = list[str]


@dataclass(frozen=True, slots=True)
class Deletion:
    """The versions that went, and the digests that this base has no use for any more: no name, no hold."""

    entries: Entries
    unused: Digests


class Registry:
    """See the module. ``recovered`` lists what start-up had to repair. Raises AdapterConflict if another holds it."""

    def __init__(self, root: Path, fingerprint: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._base = fingerprint
        self._lock = threading.RLock()
        self._guard = (root / "lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._guard.close()
            raise AdapterConflict(f"{root} is held by another server; give each its own data folder.") from None
        self._blobs = BlobStore(root, max_bytes)
        try:
            self._db = _open_database(root / "registry.sqlite")
        except BaseException:
            self._guard.close()
            raise
        self.recovered = self._reconcile()

    def stage(self) -> AbstractContextManager[Stage]:
        """A temporary folder to write an adapter's files into; it vanishes unless finished."""
        return self._blobs.stage()

    def stage_folder(self, path: Path) -> Blob:
        """Copy a folder's files and finish: see Stage.finish."""
        with self.stage() as stage:
            copy_folder(path, stage)
            return stage.finish()

    def commit(self, name: str, blob: Blob, source: str, *, family: str, rank: int, nbytes: int) -> AdapterEntry:
        """Make a staged blob the current version of a name, durably. The current version's digest again: no change.

        Ends the blob's stay as staged; a commit that raises does not, so that the caller can discard it. Raises
        AdapterNameInvalid, and AdapterConflict for a blob that is no longer staged.
        """
        check_name(name)
        with self._lock:
            if not self._blobs.is_staged(blob):
                raise AdapterConflict("The upload was discarded, or committed before.", param="name")
            with self._transaction():
                self._add_version(name, (blob.digest, family, rank, nbytes, source, time.time()))
            self.discard(blob)
            return self.get(name)

    def discard(self, blob: Blob) -> None:
        """Give a staged blob up. It goes unless a version refers to it, or somebody else holds it too.

        A second time does nothing.
        """
        self.release(blob.ticket)

    def hold(self, reference: str) -> tuple[AdapterEntry, str]:
        """As ``get``, and keeps the files until the ticket is released, whatever is deleted meanwhile."""
        with self._lock:
            entry = self.get(reference)
            return entry, self._blobs.hold(entry.digest)

    def release(self, ticket: str) -> Digests:
        """End a hold. Returns the digest where this base has no use for it any more. A second time does nothing."""
        with self._lock:
            digest = self._blobs.release(ticket)
            return [] if digest is None else self._collect([digest])

    def get(self, reference: str) -> AdapterEntry:
        """The current version of ``name``, or ``name@3``. Raises AdapterNotFound, AdapterNameInvalid."""
        name, version = parse_reference(reference)
        rows = self._entries(" AND v.name = ? AND v.version = COALESCE(?, n.current)", name, version)
        if not rows:
            raise AdapterNotFound(f"There is no adapter {reference!r}.", param="name")
        return rows[0]

    def list(self) -> Entries:
        """The current version of every name, by name."""
        return self._entries(" AND v.version = n.current ORDER BY v.name")

    def versions(self, name: str) -> Entries:
        """Every version of a name, oldest first. Raises AdapterNotFound."""
        rows = self._entries(" AND v.name = ? ORDER BY v.version", check_name(name))
        if not rows:
            raise AdapterNotFound(f"There is no adapter {name!r}.", param="name")
        return rows

    def rollback(self, name: str, version: int) -> AdapterEntry:
        """Make an earlier (or later) version current. Raises AdapterNotFound."""
        with self._lock, self._transaction():
            entry = self.get(f"{check_name(name)}@{version}")
            self._db.execute("UPDATE names SET current = ? WHERE base = ? AND name = ?", (version, self._base, name))
            return entry

    def pin(self, name: str, pinned: bool) -> AdapterEntry:
        """Mark a name, or take the mark off: new versions keep it, a delete ends it. Raises AdapterNotFound.

        It is recorded and shown. Loading and eviction do not look at it.
        """
        with self._lock, self._transaction():
            self.get(check_name(name))
            self._db.execute("UPDATE names SET pinned = ? WHERE base = ? AND name = ?", (pinned, self._base, name))
            return self.get(name)

    def delete(self, name: str) -> Deletion:
        """Remove a name with all its versions, and blobs that nobody refers to or holds. Raises AdapterNotFound."""
        with self._lock:
            with self._transaction():
                gone = self.versions(name)
                key = (self._base, name)
                self._db.execute("DELETE FROM versions WHERE base = ? AND name = ?", key)
                self._db.execute("UPDATE names SET current = NULL, pinned = 0 WHERE base = ? AND name = ?", key)
            return Deletion(gone, self._collect(sorted({entry.digest for entry in gone})))

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._guard.close()

    def _add_version(self, name: str, values: tuple[str, str, int, int, str, float]) -> None:
        current = self._entries(" AND v.name = ? AND v.version = n.current", name)
        if current and current[0].digest == values[0]:
            return
        self._db.execute(
            "INSERT INTO names (base, name, current, last) VALUES (?, ?, 1, 1) "
            "ON CONFLICT DO UPDATE SET last = last + 1, current = last + 1",
            (self._base, name),
        )
        self._db.execute(
            "INSERT INTO versions SELECT base, name, last, ?, ?, ?, ?, ?, ? FROM names WHERE base = ? AND name = ?",
            (*values, self._base, name),
        )

    def _entries(self, condition: str, *values: object) -> Entries:
        with self._lock:
            rows = self._db.execute(_ENTRY + condition, (self._base, *values)).fetchall()
        return [self._entry(*row) for row in rows]

    def _entry(
        self, name: str, version: int, digest: str, family: str, rank: int, nbytes: int, source: str, *rest: float
    ) -> AdapterEntry:
        created, pinned = rest
        path = self._blobs.path(digest)
        return AdapterEntry(name, version, digest, path, family, rank, nbytes, source, created, bool(pinned))

    def _collect(self, digests: Iterable[str]) -> Digests:
        """Those that this base has no use for. Blobs that no version of any base refers to are removed."""
        return [digest for digest in digests if self._is_unused(digest)]

    def _is_unused(self, digest: str) -> bool:
        bases = {row[0] for row in self._db.execute("SELECT DISTINCT base FROM versions WHERE digest = ?", (digest,))}
        if self._base in bases or self._blobs.is_held(digest):
            return False
        return bool(bases) or self._blobs.remove(digest)

    def _reconcile(self) -> Lines:
        digests = {row[0] for row in self._db.execute("SELECT DISTINCT digest FROM versions")}
        lost = {digest for digest in digests if not self._blobs.complete(digest)}
        log: Lines = []
        with self._transaction():
            for digest in sorted(lost):
                rows = self._db.execute("DELETE FROM versions WHERE digest = ? RETURNING name, version", (digest,))
                log += [f"dropped {name}@{version}: its blob {digest} is lost" for name, version in rows.fetchall()]
            self._db.execute(
                "UPDATE names SET current = (SELECT MAX(version) FROM versions v WHERE v.base = names.base AND "
                "v.name = names.name) WHERE current IS NOT NULL AND NOT EXISTS (SELECT 1 FROM versions v WHERE "
                "v.base = names.base AND v.name = names.name AND v.version = names.current)"
            )
        return log + self._blobs.sweep(digests - lost)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise


def _open_database(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found not in (0, _SCHEMA_VERSION):
        db.close()
        raise AdapterConflict(f"{path} has schema {found}; this version of OneBase writes schema {_SCHEMA_VERSION}.")
    db.executescript(_SCHEMA)
    db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    return db
