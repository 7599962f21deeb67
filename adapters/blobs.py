"""Blob folders: adapter files under the name of their content, staged, checked and moved into place whole.

A blob folder exists complete or not at all: files are written under staging/, checked, fsynced, and the folder is
renamed to blobs/<digest>. A blob that a caller has staged and not yet committed, or that a request may still read, is
held, so that nobody removes it. Holds end with the process: start-up removes what only they kept.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from onebase.adapters.check import CHUNK_BYTES, FileRole, check_finite, check_folder, file_role, served_files
from onebase.adapters.errors import AdapterError, AdapterRejected, AdapterTooLarge

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
    """blobs/ and staging/ under ``root``. Thread-safe; one process at a time (the registry holds the lock)."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._blobs, self._staging = root / "blobs", root / "staging"
        self._held: dict[str, str] = {}  # ticket -> digest
        self._lock = threading.RLock()
        for folder in (self._blobs, self._staging):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, digest: str) -> Path:
        return self._blobs / digest

    @contextmanager
    def stage(self) -> Iterator[Stage]:
        """A temporary folder. Whatever was not finished vanishes on leaving."""
        folder = self._temporary()
        folder.mkdir(mode=0o700)
        try:
            yield Stage(self, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, digest: str) -> str:
        """Move a folder, synced already, into place and hold it; returns a ticket. An equal blob stays."""
        with self._lock:
            target = self.path(digest)
            if not target.exists():
                os.rename(folder, target)
                sync(self._blobs)
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
        """Remove the blob, and say so, unless it is held. Readers that opened its files keep them."""
        with self._lock:
            if self.is_held(digest):
                return False
            if not self.path(digest).exists():
                return True
            trash = self._temporary()
            os.rename(self.path(digest), trash)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def complete(self, digest: str) -> bool:
        """Whether the blob is there with its files."""
        try:
            return bool(served_files(self.path(digest)))
        except (AdapterError, OSError):
            return False

    def sweep(self, wanted: Iterable[str]) -> list[str]:
        """At start-up: remove staging leftovers and blobs that nobody wants. Says what it did."""
        kept, log = set(wanted), []
        for folder in (*self._staging.iterdir(), *self._blobs.iterdir()):
            if folder.parent == self._blobs and folder.name in kept:
                continue
            shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
            log.append(f"removed {folder.parent.name}/{folder.name}: no version refers to it")
        return log

    def _temporary(self) -> Path:
        return self._staging / secrets.token_hex(16)


class Stage:
    """A folder being filled. ``open`` files, write, then ``finish`` once."""

    def __init__(self, store: BlobStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._left = store.max_bytes

    def open(self, name: str) -> StageFile:
        """A file to write. Raises AdapterRejected for a name that is not allowed, or twice the same."""
        role = file_role(name)
        try:
            return StageFile(self, self._folder / name, keep=role is not FileRole.IGNORED)
        except FileExistsError:
            raise AdapterRejected(f"The file {name!r} was sent twice.", param="files") from None

    def take(self, nbytes: int) -> None:
        """Count bytes against the limit. Raises AdapterTooLarge."""
        self._left -= nbytes
        if self._left < 0:
            raise AdapterTooLarge(f"The adapter is over {self._store.max_bytes} bytes.", param="files")

    def finish(self) -> Blob:
        """Check everything, make it durable, move it into place. Raises AdapterRejected, AdapterTooLarge."""
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
    """A file of a stage; a context manager. Files that are ignored are counted and thrown away."""

    def __init__(self, stage: Stage, path: Path, *, keep: bool) -> None:
        self._stage = stage
        self._file = path.open("xb")
        if not keep:
            path.unlink()

    def write(self, data: bytes | memoryview) -> int:
        self._stage.take(len(data))
        return self._file.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def copy_folder(source: Path, stage: Stage) -> None:
    """Copy the served files of a folder into a stage. No link is followed. Raises AdapterRejected."""
    if source.is_symlink() or not source.is_dir():
        raise AdapterRejected(f"{str(source)!r} is not a folder (links are not followed).", param="source")
    for file in served_files(source):
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


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
