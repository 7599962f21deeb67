"""Models that the registry does not have, looked up where --resolver says: once, for all who ask at that time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass

from onebase.adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRejected,
    SourceFailed,
)
from onebase.adapters.registry import AdapterEntry, Registry
from onebase.adapters.sources import Sources
from onebase.serve.api.errors import ApiError
from onebase.serve.api.fetching import Fetcher
from onebase.serve.api.store import AdapterStore

MAX_LOOKUPS = 64  # names at once; a few are fetched, the others wait
MISS_SECONDS = 30.0
FAILURE_SECONDS = 5.0  # a source that is down may soon be up again
MAX_MISSES = 10_000


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a name was not served. error: None where there is no such adapter."""

    error: AdapterError | None
    until: float

    def again(self) -> None:
        """Raises a copy, since a raised exception holds on to every frame it passes."""
        if self.error is not None:
            raise type(self.error)(self.error.message, param=self.error.param)


class Misses:
    """What was not found of late, so that asking again costs nothing. The oldest go when there are too many."""

    def __init__(self, most: int = MAX_MISSES) -> None:
        self._most = most
        self._by_name: OrderedDict[str, Miss] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Miss | None:
        miss = self._by_name.get(name)
        if miss is not None and miss.until <= time.monotonic():
            del self._by_name[name]
            return None
        return miss

    def add(self, name: str, error: AdapterError | None, seconds: float) -> None:
        self._by_name[name] = Miss(error, time.monotonic() + seconds)
        self._by_name.move_to_end(name)
        if len(self._by_name) > self._most:
            self._by_name.popitem(last=False)


class Lookups:
    """One task a name. Nothing is written for a name that is not there."""

    def __init__(self, store: AdapterStore, sources: Sources, registry: Registry) -> None:
        self._store = store
        self._sources = sources
        self._fetcher = Fetcher(store, sources, registry, "lookup")
        self._tasks: dict[str, asyncio.Task[AdapterEntry | None]] = {}
        self.misses = Misses()

    async def find(self, name: str) -> AdapterEntry | None:
        """The version that the resolver's source became; None where it has no such adapter, or there is no resolver.

        Raises AdapterError, EngineError, and ApiError 429 when too many names are being looked up.
        """
        source = self._source(name)
        if source is None:
            return None
        if (miss := self.misses.get(name)) is not None:
            miss.again()
            return None
        return await asyncio.shield(self._task(name, source))

    async def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def close(self) -> None:
        await self._fetcher.close()

    def _source(self, name: str) -> str | None:
        """None for what can be no adapter's name, as with ``name@3`` or the base's."""
        try:
            return self._sources.resolve(self._store.check_new_name(name))
        except (AdapterConflict, AdapterNameInvalid):
            return None

    def _task(self, name: str, source: str) -> asyncio.Task[AdapterEntry | None]:
        task = self._tasks.get(name)
        if task is None:
            if len(self._tasks) >= MAX_LOOKUPS:
                raise ApiError(429, "Too many unknown models are being looked up.", param="model", code="overloaded")
            task = self._tasks[name] = asyncio.create_task(self._look_up(name, source))
            task.add_done_callback(lambda done: self._forget(name, done))
        return task

    def _forget(self, name: str, task: asyncio.Task[AdapterEntry | None]) -> None:
        del self._tasks[name]
        if not task.cancelled():
            task.exception()  # seen: everybody who asked may have left

    async def _look_up(self, name: str, source: str) -> AdapterEntry | None:
        try:
            return await self._fetch(name, source)
        except AdapterNotFound:
            self.misses.add(name, None, MISS_SECONDS)
            return None
        except AdapterError as error:
            seconds = FAILURE_SECONDS if isinstance(error, SourceFailed) else MISS_SECONDS
            told = type(error)(error.message, param="model")  # what was asked for; nobody here named a source
            self.misses.add(name, told, seconds)
            raise told from error

    async def _fetch(self, name: str, source: str) -> AdapterEntry:
        try:
            await asyncio.to_thread(self._sources.check, source)
        except AdapterRejected:  # as the Hub, say, names no repository so
            raise AdapterNotFound(f"There is no adapter {name!r}.", param="model") from None
        try:
            return await self._store.get(name)  # it came while this waited
        except AdapterNotFound:
            return await self._fetcher.fetch(name, source, None, by="resolver")
