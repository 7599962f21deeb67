"""Adapters that are to be on the device whatever the traffic, and which of them it has room for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onebase.adapters.errors import EngineError, OneBaseError, StorageFailed

# A load that failed for a reason that may pass is tried again after so many seconds, then after twice as many, ...
_FIRST_RETRY, _LAST_RETRY = 1.0, 300.0
# Of what the arena can have: the rest is for everybody else.
_SHARE = 0.75

Parts = Mapping[str, int]  # block -> bytes, as AdapterCache.parts has it


@dataclass(frozen=True, slots=True)
class _Failed:
    """times: in a row; until: when it is tried again, infinity where its files are at fault."""

    times: int
    until: float


class Pins:
    """The operator's pins, in their order of rank. Those that do not fit together wait, and hold nobody up.

    What a pin takes is remembered, so that one without room is not loaded again and again to find that out. clock: in
    seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.paths: Mapping[str, str] = {}
        self._clock = clock
        self._parts: dict[str, Parts] = {}
        self._failed: dict[str, _Failed] = {}

    def replace(self, paths: Mapping[str, str]) -> None:
        """digest -> blob folder, of all of them. Those that could not be loaded are tried again."""
        self.paths = dict(paths)
        self._parts = {digest: parts for digest, parts in self._parts.items() if digest in paths}
        self._failed.clear()

    def know(self, digest: str, parts: Parts) -> None:
        """What an adapter takes."""
        if digest in self.paths and parts:
            self._parts[digest] = parts

    def fail(self, digest: str, error: OneBaseError) -> None:
        """It could not be loaded: a disk or a memory that fails says nothing about the adapter."""
        if digest in self.paths:
            times = self._failed[digest].times + 1 if digest in self._failed else 1
            wait = min(_FIRST_RETRY * 2.0 ** (times - 1), _LAST_RETRY) if _passes(error) else math.inf
            self._failed[digest] = _Failed(times, self._clock() + wait)

    def arrive(self, digest: str) -> None:
        """It is on the device."""
        self._failed.pop(digest, None)

    @property
    def retry_in(self) -> float | None:
        """Seconds until a pin is tried again; None where none is to be."""
        waits = [failed.until - self._clock() for failed in self._failed.values() if failed.until < math.inf]
        return max(min(waits), 0.0) if waits else None

    def within(self, nbytes: int) -> tuple[dict[str, str], dict[str, int]]:
        """Of a device that can have so many bytes for adapters: the pins that have room there (those of unknown size
        count nothing), and the parts that they take together."""
        room, kept, taken = int(nbytes * _SHARE), dict[str, str](), dict[str, int]()
        for digest, path in self.paths.items():
            new = {part: size for part, size in self._parts.get(digest, {}).items() if part not in taken}
            if not self._is_out(digest) and sum(new.values()) <= room:
                room -= sum(new.values())
                taken |= new
                kept[digest] = path
        return kept, taken

    def _is_out(self, digest: str) -> bool:
        return digest in self._failed and self._clock() < self._failed[digest].until


def _passes(error: OneBaseError) -> bool:
    return isinstance(error, StorageFailed | EngineError)
