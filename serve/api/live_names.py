"""Which adapters go by which names, of those that the engine has to do with: a bounded copy that needs no disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from onebase.adapters.registry import Registry
from onebase.serve.api.registry_calls import RegistryCalls

_FEW = 256  # names kept without asking whether anybody needs them


class LiveNames:
    """digest -> names whose current version it is, of adapters on the device, in host memory or waiting.

    /metrics reads ``current`` at any time. Memory follows the engine's tiers and the requests, not the registry: what
    ``in_play`` denies is forgotten once there are many.
    """

    def __init__(self, registry: Registry, call: RegistryCalls, in_play: Callable[[str], bool]) -> None:
        self._registry = registry
        self._call = call
        self._in_play = in_play
        self._names: dict[str, tuple[str, ...]] = {}
        self._most = _FEW
        self._lock = asyncio.Lock()  # a read of the registry and its place here are one step

    @property
    def current(self) -> Mapping[str, tuple[str, ...]]:
        return self._names

    async def note(self, digest: str) -> None:
        """A version is about to be used."""
        if digest in self._names:
            return
        async with self._lock:
            await self._read({digest})

    async def changed(self, name: str, digests: Collection[str]) -> list[str]:
        """A name means something else now: ``digests``, or nothing. Returns what no name or alias means any more."""
        async with self._lock:
            before = {digest for digest, names in self._names.items() if name in names}
            await self._read(before.union(digests))
            orphans = [digest for digest in before if not self._names[digest]]
            kept = await self._call(self._registry.aliased, orphans) if orphans else frozenset()
            return [digest for digest in orphans if digest not in kept]

    async def _read(self, digests: Collection[str]) -> None:
        found = await self._call(self._registry.names_of, digests)
        self._names.update({digest: found.get(digest, ()) for digest in digests})
        if len(self._names) > self._most:
            self._names = {d: names for d, names in self._names.items() if d in digests or self._in_play(d)}
            self._most = max(_FEW, 2 * len(self._names))
