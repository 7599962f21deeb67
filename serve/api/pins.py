"""Tells the engine which adapters are pinned: the whole set, after every change and every start."""

from __future__ import annotations

import asyncio

from onebase.adapters.registry import Registry
from onebase.serve.api.registry_calls import RegistryCalls
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import AdapterUse


class Pins:
    """The registry says which names are pinned; the engine keeps what they mean now on the device."""

    def __init__(self, registry: Registry, call: RegistryCalls, engine: EngineClient) -> None:
        self._registry = registry
        self._call = call
        self._engine = engine
        self._lock = asyncio.Lock()  # what is read last is sent last

    async def send(self) -> None:
        """An engine that is down gets them when it is ready again."""
        async with self._lock:
            entries = await self._call(self._registry.pinned)
            self._engine.set_pins([AdapterUse(entry.digest, str(entry.path), name=entry.name) for entry in entries])
