"""A folder of adapter folders, looked at again and again: which of them are new, changed or gone.

By polling: it sees every kind of file system (network mounts and containers' volumes raise no events), and a folder
counts only once two looks in a row saw the same, so that one which is still being copied is not taken half. Taking is
quick and can be undone, so it is easily done; what is gone is not believed so soon.
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

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Signature:
    """What a folder looks like from outside: (name, bytes, mtime in ns) of its entries, sorted."""

    entries: tuple[tuple[str, int, int], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.entries).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Scan:
    """One look. Hidden folders and plain files are in none of the three.

    unknown: listed, but they could not be looked into. odd: folders whose names are no adapter names. place: which
    folder the name of the root led to, as (st_dev, st_ino).
    """

    folders: Mapping[str, Signature]
    odd: frozenset[str]
    unknown: frozenset[str]
    place: tuple[int, int] | None


_NOTHING = Scan({}, frozenset(), frozenset(), None)


@dataclass(frozen=True, slots=True)
class Changes:
    """settled: new or changed, and the same twice. gone: missing for long enough. odd: seen for the first time.

    doubt: why nothing is taken for gone although something is missing; empty where there is no reason.
    """

    settled: tuple[str, ...]
    gone: tuple[str, ...]
    odd: tuple[str, ...]
    doubt: str = ""


def scan(root: Path) -> Scan:
    """Raises OSError where ``root`` itself cannot be read: then nothing is known, and nothing is gone."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        stat = os.fstat(handle)
        with os.scandir(handle) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and _may_be_folder(entry)]
    finally:
        os.close(handle)
    good = [name for name in names if ADAPTER_NAME.fullmatch(name)]
    looked = {name: signature(root / name) for name in good}
    folders = {name: seen for name, seen in looked.items() if seen is not None}
    odd = frozenset(names).difference(good)
    return Scan(folders, odd, frozenset(good).difference(folders), (stat.st_dev, stat.st_ino))


def signature(folder: Path) -> Signature | None:
    """None for a folder that cannot be read, or not to the end. Links are looked at, not through."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in islice(entries, MAX_FILES + 1)]
    except OSError:
        return None
    return Signature(tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)))


class FolderWatch:
    """Compares each look with the one before. ``owned``: names that an earlier process took from this folder.

    Missing is what the root's listing lacks, and it is gone once that lasted ``patience`` seconds. A look that shows no
    adapter folder, or that came to another folder than the last one that showed some, is more likely a volume that is
    not mounted than everybody's wish: nothing is missing by it.
    """

    def __init__(self, owned: Collection[str] = (), *, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._last = _NOTHING
        self._place: tuple[int, int] | None = None  # of the last look that showed an adapter folder
        self._missed: dict[str, float] = {}  # name -> the look that missed it first
        self._taken: dict[str, Signature | None] = dict.fromkeys(owned)

    def step(self, seen: Scan, now: float) -> Changes:
        """``now``: when the look was taken, in seconds of any clock that does not go back."""
        settled = sorted(
            name
            for name, found in seen.folders.items()
            if self._last.folders.get(name) == found != self._taken.get(name)
        )
        doubt, gone = self._doubt(seen), list[str]()
        if doubt:
            self.look_failed()
        else:
            gone = self._gone(seen, now)
        changes = Changes(tuple(settled), tuple(gone), tuple(sorted(seen.odd - self._last.odd)), doubt)
        self._taken |= {name: seen.folders[name] for name in settled}
        self._last = seen
        self._place = seen.place if seen.folders else self._place
        return changes

    def look_failed(self) -> None:
        """Nothing is known of what was missing before; its time begins anew."""
        self._missed = {}

    def again(self, name: str) -> None:
        """What was reported is reported again: a folder at the next look that finds it settled, or as gone in time."""
        self._taken[name] = None

    def _doubt(self, seen: Scan) -> str:
        if self._taken.keys() <= seen.folders.keys() | seen.unknown:
            return ""
        if not seen.folders:
            return "it shows no adapter folder at all"
        return "" if self._place in (None, seen.place) else "it is another folder than it was"

    def _gone(self, seen: Scan, now: float) -> list[str]:
        before = self._missed
        missing = self._taken.keys() - seen.folders.keys() - seen.unknown
        self._missed = {name: before.get(name, now) for name in missing}
        gone = sorted(name for name in missing & before.keys() if now - before[name] >= self._patience)
        for name in gone:
            del self._taken[name], self._missed[name]
        return gone


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    """Also a link that leads nowhere now: what it leads to may be mounted later."""
    try:
        return entry.is_dir() or entry.is_symlink()
    except OSError:
        return True
