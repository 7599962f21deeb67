"""What the disk does for the registry: errors a user can act on, durable folders, removal that never raises."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebase.adapters.errors import StorageFailed, StorageFull

log = logging.getLogger("onebase.adapters")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# SQLite's codes for what the disk or its file did to it; any other error is a defect of ours and stays one.
_OF_THE_DISK = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_PROTOCOL,
    }
)


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """OSError and SQLite's disk errors become StorageFailed or StorageFull. ``doing`` starts the message."""
    try:
        yield
    except OSError as error:
        raise _failed(doing, error.strerror or type(error).__name__, error.errno in _FULL) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code not in _OF_THE_DISK:
            raise
        raise _failed(doing, str(error), code == sqlite3.SQLITE_FULL) from error


def _failed(doing: str, reason: str, full: bool) -> StorageFailed:
    kind = StorageFull if full else StorageFailed
    return kind(f"{doing} failed on the server's data folder: {reason}.")


def make_folder(path: Path) -> None:
    """The folder and its parents, private, there after a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> bool:
    """Remove a file or a tree, following no link. False, and a warning in the log, where something of it is left."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed, and goes with the next gc or start: %s", path, error.strerror)
        return False
    return True


def tree_bytes(path: Path) -> int:
    """What the files below a folder take, by their sizes; 0 where it is gone."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


class Reserve:
    """A file whose blocks give a full disk room for a deletion, which then makes more.

    Without it, nothing could be deleted from a full disk: a deletion is written to the database's log first.
    """

    NBYTES = 4 << 20

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fill()

    def fill(self) -> None:
        """As far as there is room: it is for later, and whoever needs room now has it."""
        if self._path.exists():
            return
        try:
            with self._path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, self.NBYTES)
        except OSError:
            self.spend()

    def spend(self) -> bool:
        """Give the blocks back to the disk. False where there are none."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
