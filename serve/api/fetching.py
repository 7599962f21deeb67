"""From a source to a version of a name: fetched and checked in threads of their own, compiled, committed."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

from onebase.adapters.registry import AdapterEntry, AdapterState, Registry
from onebase.adapters.registry.blobs import Blob
from onebase.adapters.sources import Fetched, Sources
from onebase.serve.api.store import AdapterStore

FETCHES = 4  # at once; the others wait
_ENDING_SECONDS = 2.0
_LOOK_SECONDS = 0.5  # between looks whether an import that is being fetched is still wanted

Staged = tuple[Blob, Fetched]


class Fetcher:
    """A few fetches at once, each in a daemon thread of its own.

    So slow remotes hold up neither the registry's calls nor, where one hangs in a read, the end of the process: what
    such a thread has not finished is swept at the next start.
    """

    def __init__(self, store: AdapterStore, sources: Sources, registry: Registry, name: str) -> None:
        self._store = store
        self._sources = sources
        self._registry = registry
        self._name = name
        self._slots = asyncio.Semaphore(FETCHES)
        self._running: set[Future[Staged]] = set()

    async def fetch(
        self, name: str, source: str, revision: str | None, *, by: str, job: str | None = None
    ) -> AdapterEntry:
        """Raises AdapterError, EngineError. job: the import to keep informed; this finishes it where all goes well."""
        async with self._slots:
            blob, fetched = await asyncio.wrap_future(self._start(source, revision, job))
        return await self._store.add(name, blob, source=fetched.source, revision=fetched.revision, by=by, job=job)

    async def close(self) -> None:
        """Waits a moment for threads that are about to end."""
        await asyncio.to_thread(wait, set(self._running), _ENDING_SECONDS)

    def _start(self, source: str, revision: str | None, job: str | None) -> Future[Staged]:
        future: Future[Staged] = Future()
        future.set_running_or_notify_cancel()  # from here on nothing cancels it
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        run = partial(self._run, future, source, revision, job)
        threading.Thread(target=run, name=self._name, daemon=True).start()
        return future

    def _run(self, future: Future[Staged], source: str, revision: str | None, job: str | None) -> None:
        try:
            future.set_result(self._stage(source, revision, job))
        except BaseException as error:
            future.set_exception(error)

    def _stage(self, source: str, revision: str | None, job: str | None) -> Staged:
        if job is not None:
            self._registry.check_import(job)  # its name may have been deleted while this waited
        with self._registry.stage() as stage:
            if job is not None:
                stage.guard = _NowAndThen(partial(self._registry.check_import, job))
            fetched = self._sources.fetch(source, revision, stage)
            if job is not None:
                self._registry.set_import(job, AdapterState.CHECKING)
            return stage.finish(), fetched


class _NowAndThen:
    """Calls ``look`` at most every so many seconds, however often it is called itself."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._last = -math.inf

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last >= _LOOK_SECONDS:
            self._last = now
            self._look()
