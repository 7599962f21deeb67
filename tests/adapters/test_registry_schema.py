"""A data folder of an older OneBase opens; one of a newer is refused; an upgrade that is cut short has not begun."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from onebase.adapters.errors import AdapterConflict
from onebase.adapters.registry import Registry
from onebase.adapters.registry import schema as registry_schema

# As OneBase 0.1.0 made it.
FIRST_SCHEMA = """
CREATE TABLE IF NOT EXISTS names (
    base TEXT NOT NULL, name TEXT NOT NULL, current INTEGER, last INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (base, name)
) STRICT;
CREATE TABLE IF NOT EXISTS versions (
    base TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, family TEXT NOT NULL,
    rank INTEGER NOT NULL, nbytes INTEGER NOT NULL, source TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (base, name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest);
PRAGMA user_version = 1;
"""
DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data folder of the first schema: a with versions 2 and 3, of which 2 is current, and gone, a deleted name."""
    root = tmp_path / "data"
    blob = root / "blobs" / DIGEST
    blob.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (blob / file).write_bytes(b"{}")
    db = sqlite3.connect(root / "registry.sqlite")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(FIRST_SCHEMA)
    db.execute("INSERT INTO names VALUES ('base', 'a', 2, 3, 1), ('base', 'gone', NULL, 7, 0)")
    for version in (2, 3):
        row = ("base", "a", version, DIGEST, "LORA", 4, 77, "upload", 1.5)
        db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    db.commit()
    db.close()
    return root


def test_the_first_schema_opens(old: Path) -> None:
    for _ in range(2):
        registry = Registry(old, "base")
        entry = registry.get("a")
        assert (entry.version, entry.digest, entry.family, entry.rank, entry.nbytes) == (2, DIGEST, "LORA", 4, 77)
        assert (entry.source, entry.revision, entry.created, entry.created_by) == ("upload", None, 1.5, "")
        assert (entry.pinned, entry.labels, entry.aliases) == (True, {}, ())
        assert [version.version for version in registry.versions("a")] == [2, 3]
        assert [(gone.name, gone.last, gone.deleted) for gone in registry.deleted()] == [("gone", 7, None)]
        assert registry.imports() == ()
        assert registry.recovered == []
        registry.close()
    registry = Registry(old, "base")
    assert registry.change("a", aliases={"stable": 3}).aliases == ("stable",)
    assert registry.get("stable").version == 3
    assert registry.begin_import("gone", "hf:x/y", None, "").state == "fetching"
    registry.close()


def test_an_upgrade_that_is_cut_short_has_not_begun(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = registry_schema._STEPS
    for count in range(len(second)):
        with monkeypatch.context() as patch:
            patch.setattr(registry_schema, "_STEPS", (first, (*second[: count + 1], "SELECT cut_short")))
            with pytest.raises(sqlite3.OperationalError, match="cut_short"):
                Registry(old, "base")
        db = sqlite3.connect(old / "registry.sqlite")
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT COUNT(*) FROM sqlite_schema WHERE type = 'table'").fetchone() == (2,)
        db.close()
    registry = Registry(old, "base")
    assert registry.get("a").version == 2
    registry.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    Registry(root, "base").close()
    db = sqlite3.connect(root / "registry.sqlite")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(AdapterConflict, match="schema 9"):
        Registry(root, "base")
