"""The durable registry: names -> versions -> digest -> blob.

SQLite beside content-addressed blob folders. A version is acknowledged when its row is committed, which is after its
blob is durable; a blob is removed after its last row is and its last hold has ended. So a crash at any point leaves at
most folders without a row, and start-up removes those. Entries belong to a base model's fingerprint, and only the
entries of this base are visible. One process holds the registry; its methods may be called from any thread, and block.

Whatever is written is on the disk when the method returns. One that raises StorageFailed has changed nothing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias, TypeVar

from onebase.adapters.errors import AdapterConflict, AdapterNotFound, StorageFull
from onebase.adapters.names import check_name
from onebase.adapters.registry.blobs import DEFAULT_MAX_BYTES, Blob, BlobStore, Stage, copy_folder
from onebase.adapters.registry.changes import Changes, NewVersion
from onebase.adapters.registry.collection import Sweeper, old_versions, rubbish, without_a_name
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterEntry, AdapterState, Deletion, GcReport, Import
from onebase.adapters.registry.imports import Imports
from onebase.adapters.registry.queries import Queries
from onebase.adapters.registry.reads import RegistryReads
from onebase.adapters.registry.recovery import reconcile
from onebase.adapters.registry.storage import Reserve, make_folder, storage_errors

Digests: TypeAlias = list[str]
T = TypeVar("T")

NO_LABELS: Mapping[str, str] = {}
NO_ALIASES: Mapping[str, int | None] = {}


class Registry(RegistryReads):
    """See the module. ``recovered`` lists what start-up had to repair.

    Raises AdapterConflict if another process holds it, StorageFailed where the disk fails.
    """

    def __init__(self, root: Path, fingerprint: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._base = fingerprint
        with storage_errors("Opening the registry"):
            make_folder(root)
            self._guard = (root / "lock").open("w")
        try:
            self._take_guard(root)
            self._blobs = BlobStore(root, max_bytes)
            self._db = Database(root / "registry.sqlite")
        except BaseException:
            self._guard.close()
            raise
        self._read = Queries(self._db, fingerprint, self._blobs.path)
        self._change = Changes(self._db, fingerprint)
        self._imports = Imports(self._db, fingerprint)
        self._sweeper = Sweeper(self._db, fingerprint, self._blobs)
        try:
            self.recovered = reconcile(self._db, self._blobs)
            self._reserve = Reserve(root / "reserve")
        except BaseException:
            self.close()
            raise

    def stage(self) -> AbstractContextManager[Stage]:
        """A temporary folder to write an adapter's files into; it vanishes unless finished."""
        return self._blobs.stage()

    def stage_folder(self, path: Path) -> Blob:
        """Copy a folder's files and finish: see Stage.finish."""
        with self.stage() as stage:
            copy_folder(path, stage)
            return stage.finish()

    def commit(
        self,
        name: str,
        blob: Blob,
        source: str,
        *,
        family: str,
        rank: int,
        nbytes: int,
        revision: str | None = None,
        by: str = "",
        job: str | None = None,
    ) -> AdapterEntry:
        """Make a staged blob the current version of a name, durably. The current version's digest again: no change.

        ``job``: the import that this finishes, in the same transaction. Ends the blob's stay as staged; a commit that
        raises does not, so that the caller can discard it. Raises AdapterNameInvalid, and AdapterConflict for an alias
        or a blob that is no longer staged.
        """
        check_name(name)
        new = NewVersion(blob.digest, family, rank, nbytes, source, revision, by)
        with self._db.lock:
            if not self._blobs.is_staged(blob):
                raise AdapterConflict("The upload was discarded, or committed before.", param="name")
            with self._db.transaction():
                self._change.check_not_an_alias(name)
                self._change.add_version(name, new)
                entry = self._read.find(name)
                if job is not None:
                    self._imports.set(job, AdapterState.READY, "", entry.version)
            self.discard(blob)
            return entry

    def discard(self, blob: Blob) -> None:
        """Give a staged blob up. It goes unless a version refers to it, or somebody else holds it too.

        A second time does nothing.
        """
        self.release(blob.ticket)

    def hold(self, reference: str) -> tuple[AdapterEntry, str]:
        """As ``get``, and keeps the files until the ticket is released, whatever is deleted meanwhile."""
        with self._db.lock:
            entry = self.get(reference)
            return entry, self._blobs.hold(entry.digest)

    def release(self, ticket: str) -> Digests:
        """End a hold. Returns the digest where this base has no use for it any more. A second time does nothing."""
        digest = self._blobs.release(ticket)
        return [] if digest is None else self._sweeper.collect([digest])

    def rollback(self, name: str, version: int | None) -> AdapterEntry:
        """Make another version current. None: the one that was current before this one, else the next lower one.

        So None twice comes back. Raises AdapterNotFound.
        """
        with self._db.transaction():
            self._existing(name)
            wanted = self._change.version_before(name) if version is None else version
            entry = self._read.find(f"{name}@{wanted}")
            self._change.set_current(name, wanted)
            return entry

    def change(
        self,
        name: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str | None] = NO_LABELS,
        aliases: Mapping[str, int | None] = NO_ALIASES,
        dropped: Collection[str] = (),
    ) -> AdapterEntry:
        """All of it or nothing; a delete ends it. Raises AdapterNotFound for the name or a version.

        pinned: a mark that new versions keep. labels: None takes one off; raises AdapterRejected. aliases: added or
        moved, to a version or (None) to whatever is current; ``dropped`` ones go. They share the namespace of names:
        raises AdapterNameInvalid, and AdapterConflict for a name of an adapter or another name's alias.
        """
        with self._db.transaction():
            self._existing(name)
            self._change.alias(name, aliases, dropped)
            self._change.label(name, labels)
            if pinned is not None:
                self._change.pin(name, pinned)
            return self._read.find(name)

    def delete(self, name: str) -> Deletion:
        """Remove a name with all its versions, and blobs that nobody refers to or holds.

        Its imports count as deleted too; one that is under way will not commit. A name that has imports and no version
        is removed so too. Raises AdapterNotFound.
        """
        return self._making_room(lambda: self._delete(name))

    def begin_import(self, name: str, source: str, revision: str | None, by: str) -> Import:
        """A new import in state FETCHING, or the one under way for this name with the same source and revision.

        Raises AdapterNameInvalid; AdapterConflict if another source is under way for it, or the name is an alias.
        """
        with self._db.transaction():
            self._change.check_not_an_alias(check_name(name))
            return self._imports.begin(name, source, revision, by)

    def set_import(self, identity: str, state: AdapterState, reason: str = "", version: int | None = None) -> None:
        """Raises AdapterNotFound, and AdapterConflict for an import that is finished."""
        with self._db.transaction():
            self._imports.set(identity, state, reason, version)

    def gc(self, *, keep: int | None, dry_run: bool) -> GcReport:
        """Remove each name's versions beyond its newest ``keep`` (None: keep all), and all that nobody needs.

        Versions that are current, aliased or held stay, and those that a rollback without a version goes back to; so
        do imports under way. dry_run: only say what would go.
        """
        return self._making_room(lambda: self._gc(keep, dry_run))

    def close(self) -> None:
        with self._db.lock:
            self._db.close()
            self._guard.close()

    def _take_guard(self, root: Path) -> None:
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AdapterConflict(f"{root} is held by another server; give each its own data folder.") from None

    def _delete(self, name: str) -> Deletion:
        with self._db.transaction():
            gone = self._read.versions(check_name(name))
            if not self._imports.name_deleted(name) and not gone:
                raise AdapterNotFound(f"There is no adapter {name!r}.", param="name")
            if gone:
                self._change.delete(name)
            orphans = self._read.orphans(entry.digest for entry in gone)
        return Deletion(gone, orphans, self._sweeper.collect(orphans))

    def _gc(self, keep: int | None, dry_run: bool) -> GcReport:
        with self._db.lock:
            versions = old_versions(self._read, self._blobs, keep)
            imports = self._imports.count_finished()
            found = rubbish(self._db, self._blobs, versions)
            unused = without_a_name(self._db, self._base, versions)
            if not dry_run:
                self._forget(versions)
        gone, nbytes = (found, self._sweeper.measure(found)) if dry_run else self._sweeper.sweep(found)
        return GcReport(versions, imports, gone.blobs, gone.compiled, nbytes, unused)

    def _forget(self, versions: Sequence[AdapterEntry]) -> None:
        with self._db.transaction():
            self._change.delete_versions(versions)
            self._imports.forget_finished()

    def _making_room(self, change: Callable[[], T]) -> T:
        """A change that frees the disk is not refused because it is full: the reserve is spent on it."""
        try:
            done = change()
        except StorageFull:
            if not self._reserve.spend():
                raise
            done = change()
        self._blobs.empty_trash()
        self._reserve.fill()
        return done

    def _existing(self, name: str) -> AdapterEntry:
        """The current version of what must be a name itself, not an alias."""
        found = self._read.entries(" AND n.name = ? AND v.version = n.current", check_name(name))
        if not found:
            raise AdapterNotFound(f"There is no adapter {name!r}.", param="name")
        return found[0]
