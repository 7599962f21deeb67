"""Blob folders: adapter files under the name of their content, staged, checked and moved into place whole.

A blob folder exists complete or not at all: files are written under staging/, checked, fsynced, and the folder is
renamed to blobs/<digest>. A blob that a caller has staged and not yet committed, or that a request may still read, is
held, so that nobody removes it. Holds end with the process: start-up removes what only they kept.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from onebase.adapters.check import (
    CHUNK_BYTES,
    MAX_CONFIG_BYTES,
    MAX_FILES,
    FileRole,
    check_finite,
    check_folder,
    file_role,
    served_files,
)
from onebase.adapters.errors import AdapterError, AdapterRejected, AdapterTooLarge, StorageFailed
from onebase.adapters.storage import make_folder, remove, storage_errors, sync, tree_bytes

DEFAULT_MAX_BYTES = 16 << 30


@dataclass(frozen=True, slots=True)
class Blob:
    """A checked adapter folder in the store. family: its peft_type; nbytes: the sum of its files.

    ``ticket`` is the hold that its stager has on it.
    """

    digest: str
    path: Path
    family: str
    nbytes: int
    ticket: str


class BlobStore:
    """blobs/, compiled/ and staging/ under ``root``. Thread-safe; one process at a time (the registry holds the lock).

    compiled/<digest>/ is written by the engine and goes with its blob. Raises StorageFailed where the disk fails.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._blobs, self._compiled, self._staging = root / "blobs", root / "compiled", root / "staging"
        self._held: dict[str, str] = {}  # ticket -> digest
        self._open: set[Path] = set()  # stages that are being filled
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
        with storage_errors("Receiving the adapter"):
            folder.mkdir(mode=0o700)
        self._open.add(folder)
        try:
            yield Stage(self, folder)
        finally:
            remove(folder)
            self._open.discard(folder)

    def put(self, folder: Path, digest: str) -> str:
        """Move a folder, synced already, into place and hold it; returns a ticket. An equal blob stays."""
        with self._lock:
            target = self.path(digest)
            if target.exists() and not self.complete(digest):
                self._remove_at_once(target)
            moved = not target.exists()
            if moved:
                os.rename(folder, target)
            try:
                sync(self._blobs)
            except OSError:
                if moved:
                    self._remove_at_once(target)
                raise
            return self.hold(digest)

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

    def release(self, ticket: str) -> str | None:
        """Let go of a hold and say what it held; a second time does nothing."""
        with self._lock:
            return self._held.pop(ticket, None)

    def remove(self, digest: str) -> bool:
        """Remove the blob and its compiled forms, and say so, unless it is held. Readers of its files keep them.

        Never raises: what the disk does not let go of now goes with the next gc or start.
        """
        with self._lock:
            if self.is_held(digest):
                return False
            trash = [self._take_away(folder) for folder in (self.path(digest), self._compiled / digest)]
        for folder in trash:
            remove(folder)
        return True

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
        remove(self._staging / name)

    def sweep(self, wanted: Iterable[str]) -> list[str]:
        """At start-up: remove leftovers, and blobs and compiled forms that nobody wants. Says what it did."""
        kept, log = set(wanted), []
        for parent, names in (
            (self._staging, self.leftovers()),
            (self._blobs, self.digests() - kept),
            (self._compiled, self.compiled() - kept),
        ):
            for name in sorted(names):
                done = "removed" if remove(parent / name) else "could not remove"
                log.append(f"{done} {parent.name}/{name}: no version refers to it")
        return log

    def _take_away(self, folder: Path) -> Path:
        """Out of its place by one rename, so that it is there whole or not at all; where that fails, as it is."""
        trash = self._temporary()
        try:
            os.rename(folder, trash)
        except OSError:
            return folder
        return trash

    def _remove_at_once(self, folder: Path) -> None:
        remove(self._take_away(folder))

    def _temporary(self) -> Path:
        return self._staging / secrets.token_hex(16)


class Stage:
    """A folder being filled. ``open`` files, write, then ``finish`` once."""

    def __init__(self, store: BlobStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._left = store.max_bytes
        self._files = 0

    def open(self, name: str) -> StageFile:
        """A file to write. Raises AdapterRejected for a name that is not allowed, or twice the same."""
        role = file_role(name)
        self._files += 1
        if self._files > MAX_FILES:
            raise AdapterTooLarge(f"The adapter has more than {MAX_FILES} files.", param="files")
        try:
            with storage_errors("Receiving the adapter"):
                return StageFile(self, self._folder / name, role)
        except StorageFailed as error:
            if isinstance(error.__cause__, FileExistsError):
                raise AdapterRejected(f"The file {name!r} was sent twice.", param="files") from None
            raise

    def take(self, nbytes: int) -> None:
        """Count bytes against the limit. Raises AdapterTooLarge."""
        self._left -= nbytes
        if self._left < 0:
            raise AdapterTooLarge(f"The adapter is over {self._store.max_bytes} bytes.", param="files")

    def finish(self) -> Blob:
        """Check everything, make it durable, move it into place.

        Raises AdapterRejected, AdapterTooLarge, StorageFailed.
        """
        with storage_errors("Keeping the adapter"):
            folder = check_folder(self._folder)
            check_finite(folder)
            digest = digest_of(folder.files)
            nbytes = sum(file.stat().st_size for file in folder.files)
            for file in folder.files:
                sync(file)
            sync(self._folder)
            ticket = self._store.put(self._folder, digest)
        return Blob(digest, self._store.path(digest), folder.family, nbytes, ticket)


class StageFile:
    """A file of a stage; a context manager. Files that are ignored are counted and thrown away.

    A config over its limit is refused while it arrives. Raises AdapterTooLarge, StorageFailed.
    """

    def __init__(self, stage: Stage, path: Path, role: FileRole) -> None:
        self._stage = stage
        self._name = path.name
        self._left = MAX_CONFIG_BYTES if role is FileRole.CONFIG else None
        self._file = path.open("xb")
        if role is FileRole.IGNORED:
            path.unlink()

    def write(self, data: bytes | memoryview) -> int:
        self._stage.take(len(data))
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise AdapterTooLarge(f"{self._name} is over {MAX_CONFIG_BYTES} bytes.", param=self._name)
        with storage_errors("Receiving the adapter"):
            return self._file.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors("Receiving the adapter"):
            self._file.close()


def copy_folder(source: Path, stage: Stage) -> None:
    """Copy the served files of a folder into a stage. No link is followed. Raises AdapterRejected, StorageFailed."""
    if source.is_symlink() or not source.is_dir():
        raise AdapterRejected(f"{str(source)!r} is not a folder (links are not followed).", param="source")
    try:
        for file in served_files(source):
            _copy_file(file, stage)
    except OSError as error:
        raise AdapterRejected(f"{str(source)!r} cannot be read: {error.strerror}.", param="source") from error


def _copy_file(file: Path, stage: Stage) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as reader, stage.open(file.name) as writer:
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)


def digest_of(files: Iterable[Path]) -> str:
    """sha256 over (name, size, content) of the files in order of their names, in hex."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as reader:
            while chunk := reader.read(CHUNK_BYTES):
                total.update(chunk)
    return total.hexdigest()
