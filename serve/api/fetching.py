"""From a source to a version of a name: fetched and checked in threads of their own, compiled, committed."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor, wait

from onebase.adapters.blobs import Blob
from onebase.adapters.registry import AdapterEntry, AdapterState, Registry
from onebase.adapters.sources import Fetched, Sources
from onebase.serve.api.store import AdapterStore

FETCHES = 4  # at once; the others wait for a thread
_ENDING_SECONDS = 2.0


class Fetcher:
    """Threads of its own, so that slow remotes hold up neither the registry's calls nor each other's kind."""

    def __init__(self, store: AdapterStore, sources: Sources, registry: Registry, name: str) -> None:
        self._store = store
        self._sources = sources
        self._registry = registry
        self._threads = ThreadPoolExecutor(FETCHES, name)
        self._futures: set[Future[tuple[Blob, Fetched]]] = set()

    async def fetch(
        self, name: str, source: str, revision: str | None, *, by: str, job: str | None = None
    ) -> AdapterEntry:
        """Raises AdapterError, EngineError. job: the import to keep informed; this finishes it where all goes well."""
        future = self._threads.submit(self._stage, source, revision, job)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        blob, fetched = await asyncio.wrap_future(future)
        return await self._store.add(name, blob, source=fetched.source, revision=fetched.revision, by=by, job=job)

    async def close(self) -> None:
        """Waits a moment for threads that are about to end. Those that hang on a remote end with its next answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(wait, set(self._futures), _ENDING_SECONDS)

    def _stage(self, source: str, revision: str | None, job: str | None) -> tuple[Blob, Fetched]:
        with self._registry.stage() as stage:
            fetched = self._sources.fetch(source, revision, stage)
            if job is not None:
                self._registry.set_import(job, AdapterState.CHECKING)
            return stage.finish(), fetched
