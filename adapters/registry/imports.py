"""Imports: sources on their way to a version. Durable, so that a restart goes on with those that were under way."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection
from typing import Any

from onebase.adapters.errors import AdapterConflict, AdapterNotFound
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterState, Import

_IMPORT = "SELECT id, name, source, revision, state, reason, created, by, version FROM imports WHERE base = ?"
_UNFINISHED = " AND state IN ('fetching', 'checking')"
_FINISHED = " AND state NOT IN ('fetching', 'checking')"
_LAST = " AND number = (SELECT MAX(number) FROM imports i WHERE i.base = imports.base AND i.name = imports.name)"
_BEHIND_EVERY_NAME = "\x7f"


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
        self.check_under_way(identity)
        self._db.run(
            "UPDATE imports SET state = ?, reason = ?, version = ? WHERE base = ? AND id = ?",
            *(state, reason, version, self._base, identity),
        )

    def list(self, *, unfinished: bool, limit: int | None) -> tuple[Import, ...]:
        """Newest first."""
        condition = (_UNFINISHED if unfinished else "") + " ORDER BY number DESC LIMIT ?"
        return self._find(condition, -1 if limit is None else limit)

    def get(self, identity: str) -> Import | None:
        found = self._find(" AND id = ?", identity)
        return found[0] if found else None

    def last_in(self, state: AdapterState, after: str, prefix: str, limit: int) -> tuple[Import, ...]:
        """See Registry.last_imports."""
        condition = " AND state = ? AND name > ? AND name >= ? AND name < ?" + _LAST + " ORDER BY name LIMIT ?"
        return self._find(condition, state, after, prefix, prefix + _BEHIND_EVERY_NAME, limit)

    def under_way(self, names: Collection[str]) -> tuple[Import, ...]:
        """See Registry.under_way."""
        condition = _UNFINISHED + " AND name IN (SELECT value FROM json_each(?)) ORDER BY name"
        return self._find(condition, json.dumps(sorted(names)))

    def check_under_way(self, identity: str) -> None:
        """Raises AdapterNotFound; AdapterConflict where it is finished, or its name was deleted."""
        there = self.get(identity)
        if there is None:
            raise AdapterNotFound(f"There is no import {identity[:100]!r}.", param="id")
        if there.state.finished:
            raise AdapterConflict(f"The import {identity!r} is {there.state} already.", param="id")

    def last(self, name: str) -> Import | None:
        found = self._find(" AND name = ? ORDER BY number DESC LIMIT 1", name)
        return found[0] if found else None

    def name_deleted(self, name: str) -> int:
        """What finished ones made is gone, and one that is under way will not commit. Returns how many there were."""
        sql = "UPDATE imports SET state = 'deleted' WHERE base = ? AND name = ? AND state <> 'deleted'"
        return self._db.run(sql, self._base, name)

    def count_finished(self) -> int:
        return int(self._db.rows("SELECT COUNT(*) FROM imports WHERE base = ?" + _FINISHED, self._base)[0][0])

    def forget_finished(self) -> None:
        self._db.run("DELETE FROM imports WHERE base = ?" + _FINISHED, self._base)

    def _find(self, condition: str, *values: object) -> tuple[Import, ...]:
        return tuple(_import(*row) for row in self._db.rows(_IMPORT + condition, self._base, *values))


def _import(identity: str, name: str, source: str, revision: str | None, state: str, *rest: Any) -> Import:
    reason, created, by, version = rest
    return Import(identity, name, source, revision, AdapterState(state), reason, created, by, version)
