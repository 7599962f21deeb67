"""One adapter's files on their way into the store: received, bounded, checked, made durable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from onebase.adapters.check import (
    CHUNK_BYTES,
    MAX_FILES,
    FileRole,
    check_finite,
    check_folder,
    file_role,
    most_bytes,
    served_files,
)
from onebase.adapters.errors import AdapterRejected, AdapterTooLarge, StorageFailed
from onebase.adapters.registry.storage import storage_errors, sync


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


class Stage:
    """A folder being filled. ``open`` files, write, then ``finish`` once.

    ``put`` moves the folder, durable by then, to where its digest belongs, and returns that place and a hold on it.
    guard: called with every piece that is written; what it raises ends the filling.
    """

    def __init__(self, folder: Path, max_bytes: int, put: Callable[[Path, str], tuple[Path, str]]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._put = put
        self._left = max_bytes
        self._files = 0
        self.guard: Callable[[], None] | None = None

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
        if self.guard is not None:
            self.guard()
        self._left -= nbytes
        if self._left < 0:
            raise AdapterTooLarge(f"The adapter is over {self._max_bytes} bytes.", param="files")

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
            path, ticket = self._put(self._folder, digest)
        return Blob(digest, path, folder.family, nbytes, ticket)


class StageFile:
    """A file of a stage; a context manager. Files that are ignored are counted and thrown away.

    A file over a limit of its own is refused while it arrives. Raises AdapterTooLarge, StorageFailed.
    """

    def __init__(self, stage: Stage, path: Path, role: FileRole) -> None:
        self._stage = stage
        self._name = path.name
        self._most = self._left = most_bytes(path.name)
        self._file = path.open("xb")
        if role is FileRole.IGNORED:
            path.unlink()

    def write(self, data: bytes | memoryview) -> int:
        self._stage.take(len(data))
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise AdapterTooLarge(f"{self._name} is over {self._most} bytes.", param=self._name)
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
