"""The registry's tables, and the way to them from every older schema.

names.last outlives the versions, so that a number is never used for two adapters; current is NULL once deleted.
aliases.version is NULL where the alias follows the current version. fence: see registry/database.py.
"""

from __future__ import annotations

import sqlite3

from onebase.adapters.errors import AdapterConflict

_FIRST = (
    """CREATE TABLE IF NOT EXISTS names (
        base TEXT NOT NULL, name TEXT NOT NULL, current INTEGER, last INTEGER NOT NULL,
        pinned INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (base, name)
    ) STRICT""",
    """CREATE TABLE IF NOT EXISTS versions (
        base TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, family TEXT NOT NULL,
        rank INTEGER NOT NULL, nbytes INTEGER NOT NULL, source TEXT NOT NULL, created REAL NOT NULL,
        PRIMARY KEY (base, name, version)
    ) STRICT""",
    "CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest)",
)
_SECOND = (
    "ALTER TABLE names ADD COLUMN previous INTEGER",
    "ALTER TABLE names ADD COLUMN deleted REAL",
    "ALTER TABLE versions ADD COLUMN revision TEXT",
    "ALTER TABLE versions ADD COLUMN created_by TEXT NOT NULL DEFAULT ''",
    """CREATE TABLE labels (
        base TEXT NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (base, name, key)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE aliases (
        base TEXT NOT NULL, alias TEXT NOT NULL, name TEXT NOT NULL, version INTEGER, PRIMARY KEY (base, alias)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX aliases_by_name ON aliases (base, name, version)",
    """CREATE TABLE imports (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, base TEXT NOT NULL, name TEXT NOT NULL,
        source TEXT NOT NULL, revision TEXT, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL, by TEXT NOT NULL DEFAULT '', version INTEGER
    ) STRICT""",
    "CREATE INDEX imports_by_name ON imports (base, name, number)",
    "CREATE TABLE fence (turn INTEGER NOT NULL) STRICT",
    "INSERT INTO fence VALUES (0)",
)
_STEPS = (_FIRST, _SECOND)
SCHEMA_VERSION = len(_STEPS)


def upgrade(db: sqlite3.Connection) -> None:
    """Bring the open database to SCHEMA_VERSION, whole or not at all.

    Raises AdapterConflict for a schema of a later OneBase.
    """
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    if found > SCHEMA_VERSION:
        raise AdapterConflict(
            f"registry.sqlite has schema {found}; this version of OneBase knows schemas up to {SCHEMA_VERSION}."
        )
    if found < SCHEMA_VERSION:
        db.execute("BEGIN IMMEDIATE")
        for statement in (statement for step in _STEPS[found:] for statement in step):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
