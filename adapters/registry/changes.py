"""Changes to one base's names, as statements of a transaction that the caller has opened."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onebase.adapters.errors import AdapterConflict, AdapterNotFound, AdapterRejected
from onebase.adapters.names import check_name
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterEntry

MAX_LABELS = 64
MAX_ALIASES = 64
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_MAX_LABEL_VALUE = 256


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What a version is, besides its name and number. See AdapterEntry."""

    digest: str
    family: str
    rank: int
    nbytes: int
    source: str
    revision: str | None
    by: str


class Changes:
    """The caller has looked up that names and versions exist."""

    def __init__(self, db: Database, base: str) -> None:
        self._db = db
        self._base = base

    def add_version(self, name: str, new: NewVersion) -> None:
        """The name's next version, and current. The current version's content again: no change."""
        current = (
            "SELECT digest FROM names JOIN versions USING (base, name) "
            "WHERE base = ? AND name = ? AND version = current"
        )
        if self._db.rows(current, self._base, name) == [(new.digest,)]:
            return
        self._db.run(
            "INSERT INTO names (base, name, current, last) VALUES (?, ?, 1, 1) "
            "ON CONFLICT DO UPDATE SET previous = current, last = last + 1, current = last + 1, deleted = NULL",
            self._base,
            name,
        )
        values = (new.digest, new.family, new.rank, new.nbytes, new.source, new.revision, time.time(), new.by)
        self._db.run(
            "INSERT INTO versions "
            "(base, name, version, digest, family, rank, nbytes, source, revision, created, created_by) "
            "SELECT base, name, last, ?, ?, ?, ?, ?, ?, ?, ? FROM names WHERE base = ? AND name = ?",
            *values,
            self._base,
            name,
        )

    def version_before(self, name: str) -> int:
        """What was current before the current version, else the next lower one. Raises AdapterNotFound."""
        found = self._db.rows(
            "SELECT v.version FROM names n JOIN versions v USING (base, name) WHERE n.base = ? AND n.name = ? AND "
            "(v.version = n.previous OR v.version < n.current) ORDER BY v.version IS n.previous DESC, v.version DESC",
            self._base,
            name,
        )
        if not found:
            raise AdapterNotFound(f"{name!r} has no other version to go back to.", param="version")
        return int(found[0][0])

    def set_current(self, name: str, version: int) -> None:
        self._db.run(
            "UPDATE names SET previous = current, current = ? WHERE base = ? AND name = ? AND current <> ?",
            version,
            self._base,
            name,
            version,
        )

    def pin(self, name: str, pinned: bool) -> None:
        self._db.run("UPDATE names SET pinned = ? WHERE base = ? AND name = ?", pinned, self._base, name)

    def label(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Raises AdapterRejected for a key or value that is not allowed, or too many."""
        for key, value in changes.items():
            _check_label(key, value)
            self._db.run("DELETE FROM labels WHERE base = ? AND name = ? AND key = ?", self._base, name, key)
            if value is not None:
                self._db.run("INSERT INTO labels VALUES (?, ?, ?, ?)", self._base, name, key, value)
        self._check_count("labels", name, MAX_LABELS)

    def alias(self, name: str, aliases: Mapping[str, int | None], dropped: Iterable[str]) -> None:
        """Raises AdapterNameInvalid, AdapterNotFound for a version, AdapterConflict, AdapterRejected for too many."""
        for alias in dropped:
            self._db.run("DELETE FROM aliases WHERE base = ? AND name = ? AND alias = ?", self._base, name, alias)
        for alias, version in aliases.items():
            self._check_alias(name, check_name(alias, param="aliases"), version)
            self._db.run("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)", self._base, alias, name, version)
        self._check_count("aliases", name, MAX_ALIASES)

    def check_not_an_alias(self, name: str) -> None:
        """Raises AdapterConflict: no name may be an alias."""
        owner = self._db.rows("SELECT name FROM aliases WHERE base = ? AND alias = ?", self._base, name)
        if owner:
            raise AdapterConflict(f"{name!r} is an alias of {owner[0][0]!r}.", param="name")

    def delete(self, name: str) -> None:
        """All but the row that keeps its last number."""
        key = (self._base, name)
        for table in ("versions", "labels", "aliases"):
            self._db.run(f"DELETE FROM {table} WHERE base = ? AND name = ?", *key)
        self._db.run(
            "UPDATE names SET current = NULL, previous = NULL, pinned = 0, deleted = ? WHERE base = ? AND name = ?",
            time.time(),
            *key,
        )

    def delete_versions(self, entries: Iterable[AdapterEntry]) -> None:
        sql = "DELETE FROM versions WHERE base = ? AND name = ? AND version = ?"
        for entry in entries:
            self._db.run(sql, self._base, entry.name, entry.version)

    def _check_alias(self, name: str, alias: str, version: int | None) -> None:
        taken = "SELECT 1 FROM names WHERE base = ? AND name = ? AND current IS NOT NULL"
        if self._db.rows(taken, self._base, alias):
            raise AdapterConflict(f"The alias {alias!r} is the name of an adapter.", param="aliases")
        owner = self._db.rows("SELECT name FROM aliases WHERE base = ? AND alias = ?", self._base, alias)
        if owner not in ([], [(name,)]):
            raise AdapterConflict(f"{alias!r} is an alias of {owner[0][0]!r} already.", param="aliases")
        there = "SELECT 1 FROM versions WHERE base = ? AND name = ? AND version = ?"
        if version is not None and not self._db.rows(there, self._base, name, version):
            raise AdapterNotFound(f"There is no adapter '{name}@{version}'.", param="aliases")

    def _check_count(self, table: str, name: str, most: int) -> None:
        sql = f"SELECT COUNT(*) FROM {table} WHERE base = ? AND name = ?"
        if self._db.rows(sql, self._base, name)[0][0] > most:
            raise AdapterRejected(f"A name has at most {most} {table}.", param=table)


def _check_label(key: str, value: str | None) -> None:
    if not _LABEL_KEY.fullmatch(key):
        raise AdapterRejected(
            f"{key[:80]!r} is not a label's key: 1 to 63 of the characters A-Z a-z 0-9 . _ - / are allowed, and the "
            "first must be a letter or a digit.",
            param="labels",
        )
    if value is not None and (len(value) > _MAX_LABEL_VALUE or not value.isprintable()):
        raise AdapterRejected(
            f"The value of the label {key!r} must be at most {_MAX_LABEL_VALUE} printable characters.", param="labels"
        )
