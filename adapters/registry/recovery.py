"""Start-up: what the database says and what lies on the disk are made one again."""

from __future__ import annotations

import time

from onebase.adapters.errors import StorageFailed
from onebase.adapters.registry.blobs import BlobStore
from onebase.adapters.registry.database import Database
from onebase.adapters.registry.storage import storage_errors


def reconcile(db: Database, blobs: BlobStore) -> list[str]:
    """Says what it did, a line each. Raises StorageFailed where the disk does not answer: that is no reason to drop.

    Versions without a blob go (somebody removed it: a crash cannot), then folders without a version. Imports that
    were under way begin again.
    """
    digests = {row[0] for row in db.rows("SELECT DISTINCT digest FROM versions")}
    if digests and not blobs.digests():
        raise StorageFailed(
            "The data folder's registry.sqlite names adapters, and blobs/ has none: is its disk mounted? To begin "
            "anew, remove registry.sqlite too."
        )
    with storage_errors("Looking for the blobs"):
        lost = {digest for digest in digests if not blobs.complete(digest)}
    with db.transaction():
        log = [line for digest in sorted(lost) for line in _drop(db, digest)]
        if lost:
            _repair_names(db)
        log += _resume_imports(db)
    return log + blobs.sweep(digests - lost)


def _drop(db: Database, digest: str) -> list[str]:
    rows = db.rows("DELETE FROM versions WHERE digest = ? RETURNING name, version", digest)
    return [f"dropped {name}@{version}: its blob {digest} is lost" for name, version in rows]


def _repair_names(db: Database) -> None:
    """current moves to the newest version that is left; what pointed at a version that is gone, goes."""
    there = "SELECT 1 FROM versions v WHERE v.base = {0}.base AND v.name = {0}.name"
    db.run(
        "UPDATE names SET current = (SELECT MAX(version) FROM versions v WHERE v.base = names.base AND "
        "v.name = names.name) WHERE current IS NOT NULL AND NOT EXISTS "
        f"({there.format('names')} AND v.version = names.current)"
    )
    db.run(
        f"UPDATE names SET previous = NULL WHERE NOT EXISTS ({there.format('names')} AND v.version = names.previous)"
    )
    db.run("UPDATE names SET pinned = 0, deleted = ? WHERE current IS NULL AND deleted IS NULL", time.time())
    for table in ("labels", "aliases"):
        db.run(f"DELETE FROM {table} WHERE NOT EXISTS ({there.format(table)})")
    db.run(
        "DELETE FROM aliases WHERE version IS NOT NULL AND NOT EXISTS "
        f"({there.format('aliases')} AND v.version = aliases.version)"
    )


def _resume_imports(db: Database) -> list[str]:
    rows = db.rows("UPDATE imports SET state = 'fetching' WHERE state = 'checking' RETURNING name, source")
    return [f"the import of {name} from {source} begins again" for name, source in rows]
