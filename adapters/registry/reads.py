"""The reading half of the registry. Nothing here changes anything; all methods raise StorageFailed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from onebase.adapters.errors import AdapterNotFound
from onebase.adapters.names import check_name
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.entries import AdapterEntry, AdapterState, DeletedName, Import, Page
from onebase.adapters.registry.imports import Imports
from onebase.adapters.registry.queries import Queries

Entries: TypeAlias = list[AdapterEntry]

NO_LABELS: Mapping[str, str] = {}


class RegistryReads:
    """See registry.py, whose Registry this is a part of."""

    _db: Database
    _read: Queries
    _imports: Imports

    def get(self, reference: str) -> AdapterEntry:
        """The version that ``name``, ``name@3``, ``name@sha256:<12 to 64 hex digits>`` or an alias means now.

        Raises AdapterNotFound, AdapterNameInvalid.
        """
        with self._db.lock:
            return self._read.find(reference)

    def list(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        prefix: str | None = None,
        labels: Mapping[str, str] = NO_LABELS,
        pinned: bool | None = None,
    ) -> Page:
        """Current versions by name, ``limit`` (at least 1) at most, beginning behind the name ``after``.

        Names begin with ``prefix`` and carry all of ``labels``.
        """
        return self._read.page(after, limit, prefix, labels, pinned)

    def count(self) -> int:
        """How many names there are."""
        return self._read.count()

    def names_of(self, digests: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The names whose current version has each digest; digests without one are left out."""
        return self._read.names_of(digests)

    def aliased(self, digests: Iterable[str]) -> frozenset[str]:
        """Those of them that an alias of any name is fixed to. What follows a current version is in names_of."""
        return self._read.aliased(digests)

    def pinned(self) -> Entries:
        """The current versions of all pinned names, by name."""
        return self._read.entries(" AND v.version = n.current AND n.pinned ORDER BY n.name")

    def some_versions(self, name: str, after: int, limit: int) -> Entries:
        """Of a name's versions, oldest first, ``limit`` behind version ``after``; none where there are none."""
        return self._read.versions(check_name(name), after, limit)

    def versions(self, name: str) -> Entries:
        """Every version of a name, oldest first. Raises AdapterNotFound."""
        rows = self._read.versions(check_name(name))
        if not rows:
            raise AdapterNotFound(f"There is no adapter {name!r}.", param="name")
        return rows

    def aliases(self, name: str) -> dict[str, int | None]:
        """Alias -> version; None follows the current version."""
        return self._read.aliases(check_name(name))

    def deleted(self, *, after: str | None = None, limit: int = 100) -> tuple[DeletedName, ...]:
        """Deleted names, by name, beginning behind the name ``after``."""
        return self._read.deleted(after, limit)

    def imports(self, *, unfinished: bool = False, limit: int | None = None) -> tuple[Import, ...]:
        """Newest first. Finished ones stay until the next gc."""
        return self._imports.list(unfinished=unfinished, limit=limit)

    def find_import(self, identity: str) -> Import | None:
        """The import with this id; None once a gc has removed it."""
        return self._imports.get(identity)

    def check_import(self, identity: str) -> None:
        """Raises AdapterNotFound; AdapterConflict where the import is finished, or its name was deleted."""
        self._imports.check_under_way(identity)

    def last_imports(
        self, state: AdapterState, *, after: str | None = None, prefix: str | None = None, limit: int = 100
    ) -> tuple[Import, ...]:
        """The last import of each name where that is in ``state``: by name, beginning behind the name ``after``."""
        return self._imports.last_in(state, after or "", prefix or "", limit)

    def under_way(self, names: Collection[str]) -> tuple[Import, ...]:
        """The unfinished imports of some names."""
        return self._imports.under_way(names)

    def last_import(self, name: str) -> Import | None:
        return self._imports.last(check_name(name))
