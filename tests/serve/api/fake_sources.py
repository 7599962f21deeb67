"""Sources that a test holds in its hand, and an importer over them, a registry and a fake engine."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from onebase.adapters.errors import AdapterNotFound, AdapterRejected, SourceFailed
from onebase.adapters.registry import Registry
from onebase.adapters.registry.blobs import Stage, copy_folder
from onebase.adapters.sources import Fetched
from onebase.serve.api.imports import Importer
from onebase.serve.api.store import AdapterStore


class FakeSources:
    """``folders`` by source. A fetch waits for ``gate`` while it is not set."""

    def __init__(self, folders: dict[str, Path], resolver: str | None = None) -> None:
        self.folders = folders
        self.failures: dict[str, Exception] = {}
        self.resolver = resolver
        self.gate = threading.Event()
        self.gate.set()
        self.stopped = threading.Event()
        self.fetched: list[str] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def check(self, source: str, revision: str | None = None) -> None:
        if source.startswith("bad:"):
            raise AdapterRejected("bad source.", param="source")

    def fetch(self, source: str, revision: str | None, stage: Stage) -> Fetched:
        with self._lock:
            self.fetched.append(source)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            return self._fetch(source, revision, stage)
        finally:
            with self._lock:
                self.at_once -= 1

    def resolve(self, name: str) -> str | None:
        return None if self.resolver is None else self.resolver.replace("{name}", name)

    def close(self) -> None:
        self.stopped.set()

    def _fetch(self, source: str, revision: str | None, stage: Stage) -> Fetched:
        while not self.gate.wait(0.01):
            if self.stopped.is_set():
                raise SourceFailed("The server is stopping.", param="source")
        if source in self.failures:
            raise self.failures[source]
        if source not in self.folders:
            raise AdapterNotFound("nothing there.", param="source")
        copy_folder(self.folders[source], stage)
        return Fetched(source, revision or "commit")


class Bench:
    def __init__(self, importer: Importer, sources: FakeSources, registry: Registry, store: AdapterStore) -> None:
        self.importer, self.sources, self.registry, self.store = importer, sources, registry, store


@asynccontextmanager
async def importing(root: Path, engine: Any, sources: FakeSources) -> AsyncIterator[Bench]:
    """As a server has it: closed at the end, with whatever is under way."""
    registry = Registry(root, "f" * 64)
    store = AdapterStore(registry, engine, "base")
    importer = Importer(store, sources, registry)  # type: ignore[arg-type]
    try:
        yield Bench(importer, sources, registry, store)
    finally:
        await importer.close()
        await store.close()
        registry.close()
