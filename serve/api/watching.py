"""--watch: a folder appears and becomes an adapter, changes and becomes its next version, goes and the name is deleted.

The folder is the truth for the names whose current version came from it, and for no others: a name that somebody
uploaded, imported or rolled back to such a version is left alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import structlog

from onebase.adapters.errors import AdapterConflict, AdapterNotFound, EngineError, OneBaseError, StorageFailed
from onebase.adapters.registry import AdapterEntry
from onebase.adapters.registry.blobs import Blob, copy_folder
from onebase.adapters.watch import PATIENCE_SECONDS, FolderWatch, Scan, Signature, scan, signature
from onebase.serve.api.store import AdapterStore

log = structlog.get_logger("onebase.watch")

INTERVAL_SECONDS = 2.0
RETRY_SECONDS = 30.0
_SHARE = 20  # a look that takes a second is followed by this many of rest
_PAGE = 1000


class Watcher:
    """Looks at ``root`` until its task is cancelled. Folders are taken one at a time; an error in one stops nothing."""

    def __init__(
        self,
        store: AdapterStore,
        root: Path,
        *,
        interval: float = INTERVAL_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._store = store
        self._root = root
        self._interval = interval
        self._patience = patience
        self._watch: FolderWatch | None = None
        self._retries: dict[str, float] = {}  # name -> when (monotonic)
        self._refused: dict[str, str] = {}  # name -> what the log was told last
        self._trouble = ""  # with the root, as the log was told
        self._look_seconds = 0.0

    async def run(self) -> None:
        while True:
            try:
                await self.step()
            except Exception:
                log.exception("a look at the watched folder failed", folder=str(self._root))
            await asyncio.sleep(max(self._interval, _SHARE * self._look_seconds))

    async def step(self) -> None:
        """One look, and what follows from it."""
        if self._watch is None:
            self._watch = FolderWatch(await asyncio.to_thread(self._owned), patience=self._patience)
        try:
            seen = await asyncio.to_thread(self._look)
        except OSError as error:
            self._watch.look_failed()
            self._tell_trouble(f"it cannot be read: {error.strerror}")
            return
        self._retry(self._watch)
        changes = self._watch.step(seen, time.monotonic())
        self._tell_trouble(changes.doubt)
        for name in changes.odd:
            log.warning("the folder's name is no adapter name", folder=name[:200])
        for name in changes.settled:
            await self._guarded(name, self._take(self._watch, name, seen.folders[name]))
        for name in changes.gone:
            await self._guarded(name, self._drop(name))

    async def _take(self, watch: FolderWatch, name: str, seen: Signature) -> None:
        """A folder as it was seen becomes the name's current version.

        Not so if the newest version that came from it has the same files, whichever is current: a restart or new dates
        change nothing, and undo no rollback.
        """
        versions = await self._versions(self._store.check_new_name(name))
        if versions and not await self._is_mine(name):
            log.warning("the name is not from this folder: it is left alone", name=name)
            return
        newest = next((entry for entry in reversed(versions) if entry.source == self._source(name)), None)
        if newest is not None and newest.revision == seen.digest:
            return
        blob = await asyncio.to_thread(self._stage, name, seen)
        if blob is None:
            watch.again(name)
        elif newest is not None and newest.digest == blob.digest:
            await asyncio.to_thread(self._store.registry.discard, blob)
        else:
            entry = await self._store.add(name, blob, source=self._source(name), revision=seen.digest, by="watch")
            log.info("taken from the watched folder", name=name, version=entry.version)

    async def _drop(self, name: str) -> None:
        if await self._is_mine(name):
            await self._store.delete(name)
            log.info("gone from the watched folder, and deleted", name=name)

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """What may go well later is tried again after a while, what a check refused once the files change."""
        try:
            await work
        except OneBaseError as error:
            self._tell_refusal(name, error.message)
            if isinstance(error, EngineError | StorageFailed | AdapterConflict):
                self._retries[name] = time.monotonic() + RETRY_SECONDS
        except Exception:
            log.exception("the watched folder failed", name=name)
        else:
            self._refused.pop(name, None)

    def _tell_refusal(self, name: str, reason: str) -> None:
        """Once, however often it is tried."""
        if self._refused.get(name) != reason:
            log.warning("the watched folder is refused", name=name, reason=reason)
        self._refused[name] = reason

    def _retry(self, watch: FolderWatch) -> None:
        for name in [name for name, when in self._retries.items() if when <= time.monotonic()]:
            del self._retries[name]
            watch.again(name)

    def _look(self) -> Scan:
        start = time.monotonic()
        seen = scan(self._root)
        self._look_seconds = time.monotonic() - start
        return seen

    def _stage(self, name: str, seen: Signature) -> Blob | None:
        """None where the folder changed while it was copied."""
        with self._store.registry.stage() as stage:
            copy_folder(self._root / name, stage)
            return stage.finish() if signature(self._root / name) == seen else None

    async def _versions(self, name: str) -> Sequence[AdapterEntry]:
        try:
            return await self._store.versions(name)
        except AdapterNotFound:
            return ()

    async def _is_mine(self, name: str) -> bool:
        """Whether what the name means now came from its folder here."""
        try:
            current = await self._store.get(name)
        except AdapterNotFound:
            return False
        return (current.name, current.source) == (name, self._source(name))

    def _owned(self) -> list[str]:
        """Names that were taken from this folder; their folders may have gone while nobody looked."""
        found: list[str] = []
        page = self._store.registry.list(limit=_PAGE)
        while True:
            found += [entry.name for entry in page.entries if entry.source == self._source(entry.name)]
            if page.next is None:
                return found
            page = self._store.registry.list(after=page.next, limit=_PAGE)

    def _source(self, name: str) -> str:
        return f"watch:{self._root / name}"

    def _tell_trouble(self, trouble: str) -> None:
        """Once, until it is another one. What is registered stays."""
        if trouble and trouble != self._trouble:
            log.error("the watched folder is not believed: nothing is deleted", folder=str(self._root), reason=trouble)
        self._trouble = trouble
