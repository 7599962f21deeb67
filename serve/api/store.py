"""The adapters of a server: registry (durable) and engine (resident) kept in step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from onebase.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound, EngineError
from onebase.adapters.names import ADAPTER_NAME, check_name
from onebase.adapters.registry import AdapterEntry, AdapterState, GcReport, Import, Page, Registry
from onebase.adapters.registry.blobs import Blob
from onebase.serve.api.holds import Holds
from onebase.serve.api.import_states import ImportStates
from onebase.serve.api.live_names import LiveNames
from onebase.serve.api.pins import Pins
from onebase.serve.api.registry_calls import RegistryCalls
from onebase.serve.api.uses import Uses
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import AdapterGone, AdapterUse

log = structlog.get_logger("onebase.adapters")

# How long a load waits for room on the device.
_PLACING_SECONDS = 5.0


class AdapterStore:
    """Adds, finds, changes and removes adapters.

    Whatever changes what a name means ends in ``_changed``: the engine is told of pins, and lets go of what no name
    means any more. Memory follows what the engine holds, not what the registry has. ``checks`` see the files of each
    adapter before it gets a name, and raise AdapterRejected.
    """

    def __init__(self, registry: Registry, engine: EngineClient, base_name: str) -> None:
        self.registry = registry
        self.uses = Uses()
        self.import_states = ImportStates()
        self._call = RegistryCalls()
        self.pins = Pins(registry, self._call, engine)
        self.on_delete: list[Callable[[str], None]] = []
        self.checks: list[Callable[[Path], Awaitable[None]]] = []
        self._names = LiveNames(registry, self._call, self._is_in_play)
        self._holds = Holds()
        self._engine = engine
        self._base_name = base_name
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """digest -> names whose current version it is, of what the engine has. Answers from memory."""
        return self._names.current

    async def page(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        prefix: str | None = None,
        labels: Mapping[str, str] | None = None,
        pinned: bool | None = None,
    ) -> Page:
        """Current versions by name. See Registry.list."""
        return await self._call(
            self.registry.list, after=after, limit=limit, prefix=prefix, labels=labels or {}, pinned=pinned
        )

    async def get(self, reference: str) -> AdapterEntry:
        return await self._call(self.registry.get, reference)

    async def hold(self, reference: str, until: AsyncExitStack) -> AdapterEntry:
        """As ``get``, and its files stay until the stack closes: the engine may have to read them again."""
        entry, ticket = await self._call(self.registry.hold, reference)
        self._holds.take(entry.digest)
        until.push_async_callback(self._release, entry.digest, ticket)
        await self._names.note(entry.digest)
        return entry

    async def under_way(self, names: Collection[str]) -> tuple[Import, ...]:
        """The unfinished imports of some names."""
        return await self._call(self.registry.under_way, names)

    async def last_imports(
        self, state: AdapterState, *, after: str | None, prefix: str | None, limit: int
    ) -> tuple[Import, ...]:
        """See Registry.last_imports."""
        return await self._call(self.registry.last_imports, state, after=after, prefix=prefix, limit=limit)

    async def last_import(self, reference: str) -> Import | None:
        """The newest import of a name; None where the reference is no plain name."""
        is_name = ADAPTER_NAME.fullmatch(reference) is not None
        return await self._call(self.registry.last_import, reference) if is_name else None

    async def some_versions(self, name: str, after: int, limit: int) -> list[AdapterEntry]:
        """See Registry.some_versions."""
        return await self._call(self.registry.some_versions, check_name(name), after, limit)

    async def versions(self, name: str) -> list[AdapterEntry]:
        return await self._call(self.registry.versions, check_name(name))

    def check_new_name(self, name: str) -> str:
        """Raises AdapterNameInvalid, or AdapterConflict for the base's own name."""
        if name == self._base_name:
            raise AdapterConflict(f"{name} is the name of the base model.", param="name")
        return check_name(name)

    async def add_folder(self, name: str, folder: Path, *, source: str, by: str = "") -> AdapterEntry:
        """Copies, checks, compiles and names a folder of the server. Raises AdapterError."""
        return await self.add(name, await self._stage_folder(name, folder, source), source=source, by=by)

    async def keep_folder(self, name: str, folder: Path, *, source: str, by: str = "") -> AdapterEntry:
        """As ``add_folder``, unless any version of the name has this content: then its current version is loaded.

        So a restart with the same folders changes nothing, whatever was uploaded in between. Raises AdapterError.
        """
        blob = await self._stage_folder(name, folder, source)
        if blob.digest not in await self._digests(name):
            return await self.add(name, blob, source=source, by=by)
        await asyncio.to_thread(self.registry.discard, blob)
        return await self.load(name)

    async def add(
        self,
        name: str,
        blob: Blob,
        *,
        source: str,
        revision: str | None = None,
        by: str = "",
        job: str | None = None,
    ) -> AdapterEntry:
        """Compiles a staged blob against the base, then commits it as the name's next version; discards it if refused.

        Content that equals the name's current version adds no version. job: the import that this finishes.
        """
        self._holds.take(blob.digest)  # a replaced version of the same content does not leave meanwhile
        try:
            self.check_new_name(name)
            for check in self.checks:
                await check(blob.path)
            ready = await self._engine.load_adapter(AdapterUse(blob.digest, str(blob.path)))
            commit = partial(
                self.registry.commit, family=ready.family, rank=ready.rank, nbytes=ready.nbytes, revision=revision
            )
            entry = await self._call(commit, name, blob, source, by=by, job=job)
            self.import_states.clear(name)
            await asyncio.shield(self._changed(name, {entry.digest}, pinned=entry.pinned))
            return entry
        finally:
            await asyncio.shield(self._release(blob.digest, blob.ticket))

    async def load(self, reference: str) -> AdapterEntry:
        """Loads a version and gives it some seconds to reach the device, which may be full. Raises AdapterError."""
        async with AsyncExitStack() as held:
            entry = await self.hold(reference, held)
            await self._engine.load_adapter(AdapterUse(entry.digest, str(entry.path)))
            give_up = time.monotonic() + _PLACING_SECONDS
            while entry.digest not in self._engine.stats.resident and time.monotonic() < give_up:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the statistics come with the engine's frames
            return entry

    async def unload(self, digest: str, *, force: bool = False) -> AdapterGone:
        """Returns once the bytes are back; ``force`` aborts the requests that use it. See EngineClient."""
        return await self._engine.unload_adapter(digest, force=force)

    def unload_soon(self, digest: str, *, force: bool = False) -> None:
        """As ``unload``, for those who do not wait."""
        self._free_soon([digest], force=force)

    async def rollback(self, name: str, version: int | None) -> AdapterEntry:
        """Makes another version current. See Registry.rollback."""
        entry = await self._call(self.registry.rollback, check_name(name), version)
        await self._changed(name, {entry.digest}, pinned=entry.pinned)
        return entry

    async def change(
        self,
        name: str,
        *,
        pinned: bool | None,
        labels: Mapping[str, str | None],
        aliases: Mapping[str, int | None],
        dropped: Collection[str],
    ) -> AdapterEntry:
        """See Registry.change. Pinned: the current version stays on the device, whichever it is."""
        if self._base_name in aliases:
            raise AdapterConflict(f"The alias {self._base_name} is the name of the base model.", param="aliases")
        entry = await self._call(
            self.registry.change, name, pinned=pinned, labels=labels, aliases=aliases, dropped=dropped
        )
        if pinned is not None:
            await self._names.note(entry.digest)
            await self.pins.send()
        return entry

    async def warn_of_a_hidden_name(self) -> None:
        """The base may have another name than when the adapters came; requests for that name get the base."""
        with suppress(AdapterNotFound, AdapterNameInvalid):
            hidden = await self.get(self._base_name)
            log.warning("the base model's name hides an adapter", name=self._base_name, adapter=hidden.name)

    async def pinned_digests(self) -> frozenset[str]:
        """Of the current versions of pinned names."""
        return frozenset(entry.digest for entry in await self._call(self.registry.pinned))

    def send_pins_soon(self) -> None:
        """For an engine that has just become ready, and knows of none."""
        self._run(self.pins.send())

    async def delete(self, name: str, *, force: bool = False) -> list[AdapterEntry]:
        """Removes all versions. Content that no other name has leaves the device with the last request that uses it.

        force: those requests are aborted, but for content that a version of another name has too.
        """
        gone = await asyncio.to_thread(self.registry.delete, check_name(name))
        self.import_states.clear(name)
        for forget in self.on_delete:
            forget(name)
        await self._changed(name, (), pinned=any(entry.pinned for entry in gone.entries))
        if force:
            await asyncio.gather(*(self._free(digest, force=True) for digest in gone.orphans))
        await asyncio.gather(*map(self._free, gone.unused))
        return gone.entries

    async def gc(self, keep: int | None, *, dry_run: bool) -> GcReport:
        """See Registry.gc."""
        report = await asyncio.to_thread(self.registry.gc, keep=keep, dry_run=dry_run)
        if not dry_run:
            self.import_states.clear_failed()
            self._free_soon(report.unused)
        return report

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.close()

    async def _changed(self, name: str, digests: Collection[str], *, pinned: bool) -> None:
        """A name means something else. Requests finish on what they have; with the last one that leaves the device."""
        self._holds.revive(digests)
        orphans = await self._names.changed(name, digests)
        if pinned:
            await self.pins.send()
        self._free_soon(self._holds.retire(orphans))

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

    async def _release(self, digest: str, ticket: str) -> None:
        leaves = self._holds.give_back(digest)
        unused = await self._call(self.registry.release, ticket)
        self._free_soon([digest] if leaves else unused)

    def _free_soon(self, digests: Iterable[str], *, force: bool = False) -> None:
        """The device gets their bytes back once the engine's last use of them has ended."""
        for digest in digests:
            self._run(self._free(digest, force=force))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody waits for it, so the log is told."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the engine could not be told of a change", exc_info=error)

    async def _free(self, digest: str, *, force: bool = False) -> None:
        with suppress(EngineError, AdapterConflict):  # a dead engine holds no adapter; or it was loaded again meanwhile
            await self._engine.unload_adapter(digest, force=force)

    def _is_in_play(self, digest: str) -> bool:
        """Statistics come late: a request that has just begun is in none, but holds its content."""
        waiting = self._engine.stats.waiting_adapters
        return digest in self._holds or digest in waiting or self._engine.tier(digest) != "disk"
