"""A folder of adapter folders, looked at again and again: which of them are new, changed or gone.

By polling: it sees every kind of file system (network mounts and containers' volumes raise no events), and a folder
counts only once two looks in a row saw the same, so that one which is still being copied is not taken half.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from onebase.adapters.check import MAX_FILES
from onebase.adapters.names import ADAPTER_NAME


@dataclass(frozen=True, slots=True)
class Signature:
    """What a folder looks like from outside: (name, bytes, mtime in ns) of its entries, sorted."""

    entries: tuple[tuple[str, int, int], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.entries).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Scan:
    """One look. odd: folders whose names are no adapter names. Hidden ones and plain files are in neither."""

    folders: Mapping[str, Signature]
    odd: frozenset[str]


@dataclass(frozen=True, slots=True)
class Changes:
    """settled: new or changed, and the same twice. gone: missing twice. odd: seen for the first time."""

    settled: tuple[str, ...]
    gone: tuple[str, ...]
    odd: tuple[str, ...]


def scan(root: Path) -> Scan:
    """Raises OSError where ``root`` itself cannot be read: then nothing is known, and nothing is gone."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    good = [name for name in names if ADAPTER_NAME.fullmatch(name)]
    looked = {name: signature(root / name) for name in good}
    return Scan({name: seen for name, seen in looked.items() if seen is not None}, frozenset(names).difference(good))


def signature(folder: Path) -> Signature | None:
    """None for a folder that went while it was looked at, or cannot be read. Links are looked at, not through."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in islice(entries, MAX_FILES + 1)]
    except OSError:
        return None
    return Signature(tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)))


class FolderWatch:
    """Compares each look with the one before. ``owned``: names that an earlier process took from this folder."""

    def __init__(self, owned: Collection[str] = ()) -> None:
        self._last = Scan({}, frozenset())
        self._missed = frozenset[str]()  # by the last look
        self._taken: dict[str, Signature | None] = dict.fromkeys(owned)

    def step(self, seen: Scan) -> Changes:
        settled = [
            name
            for name, found in seen.folders.items()
            if self._last.folders.get(name) == found != self._taken.get(name)
        ]
        missed = frozenset(self._taken).difference(seen.folders)
        gone = missed & self._missed
        changes = Changes(tuple(settled), tuple(sorted(gone)), tuple(sorted(seen.odd - self._last.odd)))
        self._taken |= {name: seen.folders[name] for name in settled}
        for name in gone:
            del self._taken[name]
        self._last, self._missed = seen, missed - gone
        return changes

    def again(self, name: str) -> None:
        """A folder that was reported as settled is reported again, at the next look that finds it settled."""
        if name in self._taken:
            self._taken[name] = None
