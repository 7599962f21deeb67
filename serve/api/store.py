"""The adapters of a server: registry (durable) and engine (resident) kept in step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from onebase.adapters.blobs import Blob
from onebase.adapters.errors import AdapterConflict, AdapterNotFound, EngineError
from onebase.adapters.names import check_name
from onebase.adapters.registry import AdapterEntry, Registry
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import AdapterUse

# How long a load waits for room on the device.
_PLACING_SECONDS = 5.0


class AdapterStore:
    """Adds, finds and removes adapters. The registry's calls block, so all of them run in a thread.

    ``names`` (digest -> names whose current version it is) is a copy for /metrics, which must not touch the disk.
    """

    def __init__(self, registry: Registry, engine: EngineClient, base_name: str) -> None:
        self.registry = registry
        self.names: Mapping[str, tuple[str, ...]] = {}
        self._engine = engine
        self._base_name = base_name

    async def refresh(self) -> list[AdapterEntry]:
        entries = await asyncio.to_thread(self.registry.list)
        self.names = _by_digest(entries)
        return entries

    async def get(self, reference: str) -> AdapterEntry:
        return await asyncio.to_thread(self.registry.get, reference)

    async def hold(self, reference: str, until: AsyncExitStack) -> AdapterEntry:
        """As ``get``, and its files stay until the stack closes: the engine may have to read them again."""
        entry, ticket = await asyncio.to_thread(self.registry.hold, reference)
        until.push_async_callback(self._release, ticket)
        return entry

    async def versions(self, name: str) -> list[AdapterEntry]:
        return await asyncio.to_thread(self.registry.versions, check_name(name))

    def check_new_name(self, name: str) -> str:
        """Raises AdapterNameInvalid, or AdapterConflict for the base's own name."""
        if name == self._base_name:
            raise AdapterConflict(f"{name} is the name of the base model.", param="name")
        return check_name(name)

    async def add_folder(self, name: str, folder: Path, *, source: str) -> AdapterEntry:
        """Copies, checks, compiles and names a folder of the server. Raises AdapterError."""
        return await self.add(name, await self._stage_folder(name, folder, source), source=source)

    async def keep_folder(self, name: str, folder: Path, *, source: str) -> AdapterEntry:
        """As ``add_folder``, unless any version of the name has this content: then its current version is loaded.

        So a restart with the same folders changes nothing, whatever was uploaded in between. Raises AdapterError.
        """
        blob = await self._stage_folder(name, folder, source)
        if blob.digest not in await self._digests(name):
            return await self.add(name, blob, source=source)
        await asyncio.to_thread(self.registry.discard, blob)
        return await self.load(name)

    async def add(self, name: str, blob: Blob, *, source: str) -> AdapterEntry:
        """Compiles a staged blob against the base, then commits it as the name's next version; discards it if refused.

        Content that equals the name's current version adds no version.
        """
        try:
            self.check_new_name(name)
            ready = await self._engine.load_adapter(AdapterUse(blob.digest, str(blob.path)))
            entry = await asyncio.to_thread(
                self.registry.commit, name, blob, source, family=ready.family, rank=ready.rank, nbytes=ready.nbytes
            )
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self.registry.discard, blob))
            raise
        await self.refresh()
        return entry

    async def load(self, reference: str) -> AdapterEntry:
        """Loads a version and gives it some seconds to reach the device, which may be full. Raises AdapterError."""
        async with AsyncExitStack() as held:
            entry = await self.hold(reference, held)
            await self._engine.load_adapter(AdapterUse(entry.digest, str(entry.path)))
            give_up = time.monotonic() + _PLACING_SECONDS
            while entry.digest not in self._engine.stats.resident and time.monotonic() < give_up:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the statistics come with the engine's frames
            return entry

    async def unload(self, digest: str) -> bool:
        return (await self._engine.unload_adapter(digest)).was_resident

    async def delete(self, name: str) -> list[AdapterEntry]:
        """Removes all versions. Content that no other name has is freed once no request in flight uses it."""
        gone = await asyncio.to_thread(self.registry.delete, check_name(name))
        await self.refresh()
        await self._free(gone.unused)
        return gone.entries

    async def _stage_folder(self, name: str, folder: Path, source: str) -> Blob:
        self.check_new_name(name)
        if not await asyncio.to_thread(folder.is_dir):
            raise AdapterNotFound(f"{source} is not a folder of the server.", param="source")
        return await asyncio.to_thread(self.registry.stage_folder, folder)

    async def _digests(self, name: str) -> set[str]:
        """Of all versions of a name; none where it does not exist."""
        try:
            return {entry.digest for entry in await self.versions(name)}
        except AdapterNotFound:
            return set()

    async def _release(self, ticket: str) -> None:
        await self._free(await asyncio.to_thread(self.registry.release, ticket))

    async def _free(self, digests: Iterable[str]) -> None:
        for digest in digests:
            with suppress(EngineError):  # a dead engine holds no adapter
                await self._engine.unload_adapter(digest)


def _by_digest(entries: Iterable[AdapterEntry]) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        names[entry.digest] = (*names.get(entry.digest, ()), entry.name)
    return names
