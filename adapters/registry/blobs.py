"""Blob folders: adapter files under the name of their content, staged, checked and moved into place whole.

A blob folder exists complete or not at all: files are written under staging/, checked, fsynced, and the folder is
renamed to blobs/<digest>. A blob that a caller has staged and not yet committed, or that a request may still read, is
held, so that nobody removes it. Holds end with the process: start-up removes what only they kept.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onebase.adapters.check import served_files
from onebase.adapters.errors import AdapterError
from onebase.adapters.registry.stage import Blob, Stage, StageFile, copy_folder, digest_of
from onebase.adapters.registry.storage import make_folder, remove, storage_errors, sync, tree_bytes

__all__ = ["Blob", "BlobStore", "Stage", "StageFile", "copy_folder", "digest_of"]

log = logging.getLogger("onebase.adapters")

DEFAULT_MAX_BYTES = 16 << 30


class BlobStore:
    """blobs/, compiled/ and staging/ under ``root``. Thread-safe; one process at a time (the registry holds the lock).

    compiled/<digest>/ is written by the engine and goes with its blob. Raises StorageFailed where the disk fails.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._blobs, self._compiled, self._staging = root / "blobs", root / "compiled", root / "staging"
        self._held: dict[str, str] = {}  # ticket -> digest
        self._open: set[Path] = set()  # stages that are being filled
        self._trash: list[Path] = []
        self._lock = threading.RLock()
        with storage_errors("Making folders"):
            for folder in (self._blobs, self._compiled, self._staging):
                make_folder(folder)

    def path(self, digest: str) -> Path:
        return self._blobs / digest

    @contextmanager
    def stage(self) -> Iterator[Stage]:
        """A temporary folder. Whatever was not finished vanishes on leaving."""
        folder = self._temporary()
        with self._lock:
            self._open.add(folder)
        try:
            with storage_errors("Receiving the adapter"):
                folder.mkdir(mode=0o700)
            yield Stage(folder, self.max_bytes, self.put)
        finally:
            remove(folder)
            with self._lock:
                self._open.discard(folder)
            self.empty_trash()

    def put(self, folder: Path, digest: str) -> tuple[Path, str]:
        """Move a folder, synced already, into place and hold it; returns the place and a ticket.

        An equal blob stays, if it is whole.
        """
        with self._lock:
            target = self.path(digest)
            if target.exists() and not self.complete(digest):
                self._take_away(target)
            moved = not target.exists()
            if moved:
                os.rename(folder, target)
            try:
                sync(self._blobs)
            except OSError:
                if moved:
                    self._take_away(target)
                raise
            return target, self.hold(digest)

    def hold(self, digest: str) -> str:
        """Keep the blob until the ticket that this returns is released."""
        with self._lock:
            ticket = secrets.token_hex(16)
            self._held[ticket] = digest
            return ticket

    def is_staged(self, blob: Blob) -> bool:
        with self._lock:
            return self._held.get(blob.ticket) == blob.digest

    def is_held(self, digest: str) -> bool:
        with self._lock:
            return digest in self._held.values()

    def held(self) -> frozenset[str]:
        """The digests that somebody holds."""
        with self._lock:
            return frozenset(self._held.values())

    def release(self, ticket: str) -> str | None:
        """Let go of a hold and say what it held; a second time does nothing."""
        with self._lock:
            return self._held.pop(ticket, None)

    def remove(self, digest: str) -> bool:
        """Remove the blob and its compiled forms, and say so, unless it is held. Readers of its files keep them.

        Takes the time of two renames; empty_trash frees the disk. Never raises: what the disk does not let go of goes
        with the next gc or start.
        """
        with self._lock:
            if self.is_held(digest):
                return False
            self._take_away(self.path(digest))
            self._take_away(self._compiled / digest)
            return True

    def empty_trash(self) -> None:
        """Frees the disk of what was removed; for that, nobody needs to hold a lock."""
        while self._trash:
            with suppress(IndexError):
                remove(self._trash.pop())

    def complete(self, digest: str) -> bool:
        """Whether the blob is there with its files. A disk that fails to say raises OSError."""
        try:
            return bool(served_files(self.path(digest)))
        except (AdapterError, FileNotFoundError, NotADirectoryError):
            return False

    def digests(self) -> set[str]:
        """What lies in blobs/, referred to or not."""
        with storage_errors("Listing the blobs"):
            return {entry.name for entry in os.scandir(self._blobs)}

    def compiled(self) -> set[str]:
        """What lies in compiled/."""
        with storage_errors("Listing the compiled forms"):
            return {entry.name for entry in os.scandir(self._compiled)}

    def nbytes(self, digest: str) -> int:
        """What a blob and its compiled forms take on the disk, by the sizes of their files."""
        with storage_errors("Measuring an adapter"):
            return tree_bytes(self.path(digest)) + tree_bytes(self._compiled / digest)

    def leftovers(self) -> set[str]:
        """What lies in staging/ and is not being filled: removals that the disk refused."""
        with self._lock, storage_errors("Listing the staging folder"):
            return {entry.name for entry in os.scandir(self._staging)} - {folder.name for folder in self._open}

    def remove_leftover(self, name: str) -> None:
        self._trash.append(self._staging / name)

    def sweep(self, wanted: Iterable[str]) -> list[str]:
        """At start-up: remove leftovers, and blobs and compiled forms that nobody wants. Says what it did."""
        kept, lines = set(wanted), []
        for parent, names in (
            (self._staging, self.leftovers()),
            (self._blobs, self.digests() - kept),
            (self._compiled, self.compiled() - kept),
        ):
            for name in sorted(names):
                done = "removed" if remove(parent / name) else "could not remove"
                lines.append(f"{done} {parent.name}/{name}: no version refers to it")
        return lines

    def _take_away(self, folder: Path) -> None:
        """Into the trash by one rename, so that it is there whole or not at all."""
        trash = self._temporary()
        try:
            os.rename(folder, trash)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s could not be removed, and goes with the next gc or start: %s", folder, error.strerror)
            return
        self._trash.append(trash)

    def _temporary(self) -> Path:
        return self._staging / secrets.token_hex(16)
