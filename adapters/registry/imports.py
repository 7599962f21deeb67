"""Imports: sources on their way to a version. Durable, so that a restart goes on with those that were under way."""

from __future__ import annotations

import secrets
import time
from typing import Any

from onebase.adapters.errors import AdapterConflict, AdapterNotFound
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterState, Import

_IMPORT = "SELECT id, name, source, revision, state, reason, created, by, version FROM imports WHERE base = ?"
_UNFINISHED = " AND state IN ('fetching', 'checking')"
_FINISHED = " AND state NOT IN ('fetching', 'checking')"


class Imports:
    """One base's imports. Methods that write are called in a transaction."""

    def __init__(self, db: Database, base: str) -> None:
        self._db = db
        self._base = base

    def begin(self, name: str, source: str, revision: str | None, by: str) -> Import:
        """See Registry.begin_import."""
        under_way = self._find(_UNFINISHED + " AND name = ?", name)
        if under_way and (under_way[0].source, under_way[0].revision) == (source, revision):
            return under_way[0]
        if under_way:
            raise AdapterConflict(
                f"{name!r} is being imported from {under_way[0].source!r}; wait for it.", param="name"
            )
        made = Import(
            secrets.token_hex(8), name, source, revision, AdapterState.FETCHING, "", time.time(), by, version=None
        )
        self._db.run(
            "INSERT INTO imports (id, base, name, source, revision, state, created, by) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(made.id, self._base, name, source, revision, made.state, made.created, by),
        )
        return made

    def set(self, identity: str, state: AdapterState, reason: str, version: int | None) -> None:
        """See Registry.set_import."""
        there = self._find(" AND id = ?", identity)
        if not there:
            raise AdapterNotFound(f"There is no import {identity[:100]!r}.", param="id")
        if there[0].state.finished:
            raise AdapterConflict(f"The import {identity!r} is {there[0].state} already.", param="id")
        self._db.run(
            "UPDATE imports SET state = ?, reason = ?, version = ? WHERE base = ? AND id = ?",
            *(state, reason, version, self._base, identity),
        )

    def list(self, *, unfinished: bool, limit: int) -> tuple[Import, ...]:
        """Newest first."""
        return self._find((_UNFINISHED if unfinished else "") + " ORDER BY number DESC LIMIT ?", limit)

    def last(self, name: str) -> Import | None:
        found = self._find(" AND name = ? ORDER BY number DESC LIMIT 1", name)
        return found[0] if found else None

    def name_deleted(self, name: str) -> None:
        """What a finished import made is gone; one that is under way goes on."""
        sql = "UPDATE imports SET state = 'deleted' WHERE base = ? AND name = ? AND state = 'ready'"
        self._db.run(sql, self._base, name)

    def count_finished(self) -> int:
        return int(self._db.rows("SELECT COUNT(*) FROM imports WHERE base = ?" + _FINISHED, self._base)[0][0])

    def forget_finished(self) -> None:
        self._db.run("DELETE FROM imports WHERE base = ?" + _FINISHED, self._base)

    def _find(self, condition: str, *values: object) -> tuple[Import, ...]:
        return tuple(_import(*row) for row in self._db.rows(_IMPORT + condition, self._base, *values))


def _import(identity: str, name: str, source: str, revision: str | None, state: str, *rest: Any) -> Import:
    reason, created, by, version = rest
    return Import(identity, name, source, revision, AdapterState(state), reason, created, by, version)
