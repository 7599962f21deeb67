"""Reads of one base's part of the registry: rows become entries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from onebase.adapters.errors import AdapterNotFound
from onebase.adapters.names import Reference, parse_reference
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterEntry, DeletedName, Page

# CROSS JOIN fixes the order of the loops, here and below: names first, whose key is the order of pages.
_ENTRY = """
SELECT v.name, v.version, v.digest, v.family, v.rank, v.nbytes, v.source, v.revision, v.created, v.created_by, n.pinned,
    (SELECT json_group_object(key, value) FROM labels l WHERE l.base = n.base AND l.name = n.name),
    (SELECT json_group_array(alias) FROM aliases a WHERE a.base = n.base AND a.name = n.name)
FROM names n CROSS JOIN versions v ON v.base = n.base AND v.name = n.name WHERE n.base = ?
"""
_BEHIND_EVERY_NAME = "\x7f"


class Queries:
    """What stands in the registry for one base. ``path`` says where a digest's blob lies. All raise StorageFailed."""

    def __init__(self, db: Database, base: str, path: Callable[[str], Path]) -> None:
        self._db = db
        self._base = base
        self._path = path

    def entries(self, condition: str, *values: object) -> list[AdapterEntry]:
        """Versions v of names n that meet a condition, which may end in an order and a limit."""
        return [self._entry(*row) for row in self._db.rows(_ENTRY + condition, self._base, *values)]

    def find(self, reference: str) -> AdapterEntry:
        """See Registry.get."""
        wanted = parse_reference(reference)
        found = self._by_digest(wanted) if wanted.digest else self._by_version(wanted.name, wanted.version)
        if not found and wanted.bare:
            found = self._by_alias(wanted.name)
        if not found:
            raise AdapterNotFound(f"There is no adapter {reference!r}.", param="name")
        return found[0]

    def versions(self, name: str, after: int = 0, limit: int = -1) -> list[AdapterEntry]:
        """Oldest first, behind version ``after``, ``limit`` at most (-1: all); none for a name that is not there."""
        return self.entries(" AND n.name = ? AND v.version > ? ORDER BY v.version LIMIT ?", name, after, limit)

    def page(
        self, after: str | None, limit: int, prefix: str | None, labels: Mapping[str, str], pinned: bool | None
    ) -> Page:
        """See Registry.list."""
        condition, values = " AND v.version = n.current AND n.name > ?", list[object]([after or ""])
        if prefix:
            condition += " AND n.name >= ? AND n.name < ?"
            values += [prefix, prefix + _BEHIND_EVERY_NAME]
        if pinned is not None:
            condition += " AND n.pinned = ?"
            values.append(pinned)
        for key, value in labels.items():
            condition += (
                " AND EXISTS (SELECT 1 FROM labels WHERE base = n.base AND name = n.name AND key = ? AND value = ?)"
            )
            values += [key, value]
        found = self.entries(condition + " ORDER BY n.name LIMIT ?", *values, limit + 1)
        return Page(tuple(found[:limit]), found[limit - 1].name if len(found) > limit else None)

    def count(self) -> int:
        return int(self._db.rows("SELECT COUNT(*) FROM names WHERE base = ? AND current IS NOT NULL", self._base)[0][0])

    def names_of(self, digests: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """See Registry.names_of."""
        rows = self._db.rows(
            "SELECT v.digest, v.name FROM json_each(?) wanted "
            "CROSS JOIN versions v INDEXED BY versions_by_digest ON v.digest = wanted.value "
            "CROSS JOIN names n USING (base, name) WHERE v.base = ? AND v.version = n.current "
            "ORDER BY v.digest, v.name",
            json.dumps(sorted(set(digests))),
            self._base,
        )
        by_digest = groupby(rows, key=lambda row: row[0])
        return {digest: tuple(name for _, name in some) for digest, some in by_digest}

    def aliased(self, digests: Iterable[str]) -> frozenset[str]:
        """See Registry.aliased."""
        rows = self._db.rows(
            "SELECT DISTINCT v.digest FROM json_each(?) wanted "
            "CROSS JOIN versions v INDEXED BY versions_by_digest ON v.digest = wanted.value "
            "JOIN aliases a ON a.base = v.base AND a.name = v.name AND a.version = v.version WHERE v.base = ?",
            json.dumps(sorted(set(digests))),
            self._base,
        )
        return frozenset(digest for (digest,) in rows)

    def orphans(self, digests: Iterable[str]) -> list[str]:
        """Those that no version of any name has, be it current or not."""
        rows = self._db.rows(
            "SELECT value FROM json_each(?) WHERE NOT EXISTS "
            "(SELECT 1 FROM versions WHERE digest = value AND base = ?) ORDER BY value",
            json.dumps(sorted(set(digests))),
            self._base,
        )
        return [digest for (digest,) in rows]

    def aliases(self, name: str) -> dict[str, int | None]:
        sql = "SELECT alias, version FROM aliases WHERE base = ? AND name = ? ORDER BY alias"
        return dict(self._db.rows(sql, self._base, name))

    def deleted(self, after: str | None, limit: int) -> tuple[DeletedName, ...]:
        """See Registry.deleted."""
        rows = self._db.rows(
            "SELECT name, last, deleted FROM names WHERE base = ? AND current IS NULL AND name > ? "
            "ORDER BY name LIMIT ?",
            *(self._base, after or "", limit),
        )
        return tuple(DeletedName(*row) for row in rows)

    def _by_version(self, name: str, version: int | None) -> list[AdapterEntry]:
        return self.entries(" AND n.name = ? AND v.version = COALESCE(?, n.current)", name, version)

    def _by_digest(self, wanted: Reference) -> list[AdapterEntry]:
        """The current version where it has the digest, else the newest that has. An ambiguous start finds nothing."""
        found = self.entries(
            " AND n.name = ? AND substr(v.digest, 1, ?) = ? ORDER BY v.version = n.current DESC, v.version DESC",
            wanted.name,
            len(wanted.digest or ""),
            wanted.digest,
        )
        return found if len({entry.digest for entry in found}) == 1 else []

    def _by_alias(self, alias: str) -> list[AdapterEntry]:
        sql = "SELECT name, version FROM aliases WHERE base = ? AND alias = ?"
        rows = self._db.rows(sql, self._base, alias)
        return self._by_version(*rows[0]) if rows else []

    def _entry(self, name: str, version: int, digest: str, *rest: Any) -> AdapterEntry:
        family, rank, nbytes, source, revision, created, by, pinned, labels, aliases = rest
        return AdapterEntry(
            name,
            version,
            digest,
            self._path(digest),
            family,
            rank,
            nbytes,
            source,
            revision,
            created,
            by,
            bool(pinned),
            json.loads(labels),
            tuple(sorted(json.loads(aliases))),
        )
