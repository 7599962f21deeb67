"""One SQLite connection whose failed commits leave no trace.

WAL and synchronous=FULL: COMMIT appends the transaction's frames to the log and syncs it. Where that sync fails, SQLite
forgets the frames, but they lie in the log's file behind the last frame that it believes in, and whoever opens the
database after a crash finds them whole: a change that was answered with an error would hold. So a failed commit is
followed by a fence, a transaction that overwrites the place behind the last good frame; each frame's checksum
continues that of the one before, so that nothing behind it counts any more. Where the fence fails too, no change is
taken until one succeeds, and the failure is called uncertain if it came after the last frame was written.

The log's index lies in memory (locking_mode=EXCLUSIVE), not in a mapped file that a full disk could tear.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from onebase.adapters.errors import StorageFailed, StorageUncertain
from onebase.adapters.registry.schema import upgrade
from onebase.adapters.registry.storage import storage_errors

_FENCE_TRIES = 3
# The failures of a commit after which its last frame, the one that counts, is not whole.
_NOT_WHOLE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})


class Database:
    """See the module. ``lock`` is held for the length of a transaction, and by whoever needs a state to stand still.

    uncertain: whether the last change, answered with StorageUncertain, may still turn out to hold.
    """

    def __init__(self, path: Path) -> None:
        self.lock = threading.RLock()
        self.uncertain = False
        self._fenced = False
        with storage_errors("Opening the registry"):
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                _set_up(self._db)
                upgrade(self._db)
            except BaseException:
                self._db.close()
                raise

    def rows(self, sql: str, *values: object) -> list[Any]:
        """All rows of a query. Raises StorageFailed."""
        with self.lock, storage_errors("Reading the registry"):
            return self._db.execute(sql, values).fetchall()

    def run(self, sql: str, *values: object) -> int:
        """A statement inside a transaction; returns how many rows it touched."""
        assert self._db.in_transaction
        return self._db.execute(sql, values).rowcount

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; done, and on the disk, once it is left. Raises StorageFailed."""
        with self.lock, storage_errors("Writing the registry"):
            if self._fenced:
                self._raise_fence()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._roll_back()
                raise
            self._commit()

    def close(self) -> None:
        with self.lock:
            self._db.close()

    def _commit(self) -> None:
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            self._fenced = True
            with suppress(sqlite3.Error):
                self._raise_fence()
            self.uncertain = self._fenced and error.sqlite_errorcode not in _NOT_WHOLE
            if not self.uncertain:
                raise
            raise StorageUncertain(
                "Writing the registry failed, and so did undoing it: the change does not hold now, and may hold after "
                f"a restart ({error}). No change is taken until the disk of the data folder works again."
            ) from error

    def _raise_fence(self) -> None:
        """See the module. Raises sqlite3.Error."""
        for left in reversed(range(_FENCE_TRIES)):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("UPDATE fence SET turn = turn + 1")
                self._db.execute("COMMIT")
            except sqlite3.Error:
                self._roll_back()
                if not left:
                    raise
            else:
                self._fenced = self.uncertain = False
                return

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # SQLite ends it by itself where the disk failed
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")


def _set_up(db: sqlite3.Connection) -> None:
    """SQLite answers a pragma that it cannot follow with what it does instead."""
    db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StorageFailed(f"The registry needs SQLite's write-ahead log, and the data folder allows only {mode!r}.")
    db.execute("PRAGMA synchronous = FULL").fetchall()
