"""Adapters that are to be on the device whatever the traffic, and which of them it has room for."""

from __future__ import annotations

from collections.abc import Mapping

# Of what the arena can have: the rest is for everybody else.
_SHARE = 0.75

Parts = Mapping[str, int]  # block -> bytes, as AdapterCache.parts has it


class Pins:
    """The operator's pins, in their order of rank. Those that do not fit together wait, and hold nobody up.

    What a pin takes is remembered, so that one without room is not loaded again and again to find that out.
    """

    def __init__(self) -> None:
        self.paths: Mapping[str, str] = {}
        self._parts: dict[str, Parts] = {}
        self._failed: set[str] = set()

    def replace(self, paths: Mapping[str, str]) -> None:
        """digest -> blob folder, of all of them. Those that could not be loaded are tried again."""
        self.paths = dict(paths)
        self._parts = {digest: parts for digest, parts in self._parts.items() if digest in paths}
        self._failed.clear()

    def know(self, digest: str, parts: Parts) -> None:
        """What an adapter takes."""
        if digest in self.paths and parts:
            self._parts[digest] = parts

    def fail(self, digest: str) -> None:
        """It could not be loaded."""
        if digest in self.paths:
            self._failed.add(digest)

    def within(self, nbytes: int) -> tuple[dict[str, str], dict[str, int]]:
        """Of a device that can have so many bytes for adapters: the pins that have room there (those of unknown size
        count nothing), and the parts that they take together."""
        room, kept, taken = int(nbytes * _SHARE), dict[str, str](), dict[str, int]()
        for digest, path in self.paths.items():
            new = {part: size for part, size in self._parts.get(digest, {}).items() if part not in taken}
            if digest not in self._failed and sum(new.values()) <= room:
                room -= sum(new.values())
                taken |= new
                kept[digest] = path
        return kept, taken
