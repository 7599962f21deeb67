"""Imports in the background: durable jobs that a restart goes on with, and names that the resolver finds."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from onebase.adapters.errors import AdapterConflict, AdapterError, AdapterNotFound, AdapterRejected, OneBaseError
from onebase.adapters.registry import AdapterEntry, AdapterState, Import, Registry
from onebase.adapters.sources import Sources
from onebase.serve.api.fetching import Fetcher
from onebase.serve.api.import_states import FAILED, IMPORTING
from onebase.serve.api.lookups import Lookups
from onebase.serve.api.store import AdapterStore

log = structlog.get_logger("onebase.imports")

MAX_REASON = 1000


class Importer:
    """Runs imports; the registry keeps them. One import of a name is under way at a time.

    Nobody's leaving cancels an import. At the end of the process it stays unfinished, for ``resume`` at the next start.
    """

    def __init__(self, store: AdapterStore, sources: Sources, registry: Registry) -> None:
        self._store = store
        self._sources = sources
        self._registry = registry
        self._fetcher = Fetcher(store, sources, registry, "import")
        self._lookups = Lookups(store, sources, registry)
        self._tasks: dict[str, asyncio.Task[AdapterEntry]] = {}
        self._beginning = asyncio.Lock()  # no import ends between a begin that joins it and the look for its task

    async def start(self, name: str, source: str, revision: str | None, by: str) -> Import:
        """A new import, or the one under way for this name, source and revision.

        Raises AdapterError for what could never be fetched, AdapterConflict while the name's import is another.
        """
        self._store.check_new_name(name)
        await asyncio.to_thread(self._sources.check, source, revision)
        async with self._beginning:
            job = await asyncio.to_thread(self._registry.begin_import, name, source, revision, by)
            self._ensure(job)
        return job

    async def wait(self, identity: str) -> AdapterEntry:
        """The version that an import makes, once it has. Raises what made it fail; AdapterNotFound without one."""
        task = self._tasks.get(identity)
        if task is not None:
            return await asyncio.shield(task)
        job = await asyncio.to_thread(self._registry.find_import, identity)
        if job is None or job.state is AdapterState.DELETED:
            raise AdapterNotFound(f"There is no import {identity[:100]!r}.", param="id")
        if job.state is AdapterState.FAILED:
            raise AdapterRejected(job.reason, param="source")
        return await self._store.get(job.name if job.version is None else f"{job.name}@{job.version}")

    async def resume(self) -> None:
        """At start: goes on with what the last process left unfinished, oldest first."""
        for job in reversed(await asyncio.to_thread(self._registry.imports, unfinished=True)):
            log.info("import resumed", name=job.name, id=job.id)
            self._ensure(job)

    async def resolve(self, name: str) -> AdapterEntry | None:
        """What --resolver finds for a name that the registry has not. None where there is nothing. See Lookups."""
        return await self._lookups.find(name)

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), self._lookups.cancel(), return_exceptions=True)
        self._sources.close()  # not before: what it ends would count as failed
        await asyncio.gather(self._fetcher.close(), self._lookups.close())

    def _ensure(self, job: Import) -> None:
        if job.id in self._tasks:
            return
        self._store.import_states.set(job.name, IMPORTING)
        task = asyncio.create_task(self._run(job))
        self._tasks[job.id] = task
        task.add_done_callback(_seen)

    async def _run(self, job: Import) -> AdapterEntry:
        try:
            return await self._import(job)
        finally:
            async with self._beginning:
                del self._tasks[job.id]

    async def _import(self, job: Import) -> AdapterEntry:
        try:
            return await self._fetcher.fetch(job.name, job.source, job.revision, by=job.by, job=job.id)
        except OneBaseError as error:
            log.warning("import failed", name=job.name, id=job.id, reason=error.message)
            await self._fail(job, error.message)
            raise
        except Exception:
            log.exception("import failed", name=job.name, id=job.id)
            await self._fail(job, "Internal error; the server's log has the details.")
            raise

    async def _fail(self, job: Import, reason: str) -> None:
        """Where even this cannot be written, the import is resumed at the next start.

        It may have been deleted, and another of its name begun: then that one's state is the name's.
        """
        with suppress(AdapterError):
            with suppress(AdapterConflict, AdapterNotFound):
                await asyncio.to_thread(self._registry.set_import, job.id, AdapterState.FAILED, reason[:MAX_REASON])
            self._tell(job.name, await asyncio.to_thread(self._registry.last_import, job.name))

    def _tell(self, name: str, last: Import | None) -> None:
        """What /metrics says of a name follows its last import."""
        if last is not None and not last.state.finished:
            self._store.import_states.set(name, IMPORTING)
        elif last is not None and last.state is AdapterState.FAILED:
            self._store.import_states.set(name, FAILED)
        else:
            self._store.import_states.clear(name)


def _seen(task: asyncio.Task[AdapterEntry]) -> None:
    """Whoever waits gets the failure too, and there may be nobody."""
    if not task.cancelled():
        task.exception()
