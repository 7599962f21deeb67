"""Start-up in the background: /health answers at once, /ready once engine, registry and adapters are there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import structlog

from onebase.adapters.errors import ModelRejected, OneBaseError
from onebase.adapters.registry import Registry
from onebase.adapters.sources import Sources
from onebase.serve.api.codecs import Codecs
from onebase.serve.api.imports import Importer
from onebase.serve.api.state import Loaded, Server
from onebase.serve.api.store import AdapterStore
from onebase.serve.api.tokenizer import TextCodec, Workers
from onebase.serve.api.watching import Watcher
from onebase.serve.config import Settings

log = structlog.get_logger("onebase.serve")


@asynccontextmanager
async def running(server: Server) -> AsyncGenerator[None, None]:
    """Boots and then watches in a task, and stops the engine at the end whatever happened."""
    task = asyncio.create_task(_boot_and_watch(server))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if server.loaded is not None:
            await server.loaded.imports.close()  # before the engine: an import that is cut short goes on at next start
        await server.engine.stop()
        server.parsers.shutdown(wait=False, cancel_futures=True)
        await server.grammars.close()
        if server.loaded is not None:
            await asyncio.to_thread(server.loaded.codecs.close)
            await asyncio.to_thread(server.loaded.workers.close)
            await server.loaded.store.close()
            server.loaded.store.registry.close()


async def _boot_and_watch(server: Server) -> None:
    await _boot_or_fail(server)
    if server.loaded is not None and server.settings.watch is not None:
        await Watcher(server.loaded.store, server.settings.watch).run()


async def _boot_or_fail(server: Server) -> None:
    try:
        server.loaded = await _boot(server)
    except Exception as error:  # whatever it is, a server that cannot start has to end and say why
        known = isinstance(error, OneBaseError)
        server.failure = str(error) if known else f"{type(error).__name__}: {error}"
        log.error("the server cannot start", reason=server.failure, exc_info=None if known else error)
        for hook in server.on_failure:
            hook()
        return
    for hook in server.on_ready:
        hook()


async def _boot(server: Server) -> Loaded:
    settings = server.settings
    workers = Workers.start()
    codec, _ = await asyncio.gather(asyncio.to_thread(_load_codec, server, workers), server.engine.start())
    info = server.engine.info
    if info is None:
        raise ModelRejected("The engine started without saying what it serves.")
    registry = await asyncio.to_thread(_open_registry, settings, info.fingerprint)
    store = AdapterStore(registry, server.engine, settings.base_name)
    store.on_delete.append(server.metrics.models.forget)
    codecs = await asyncio.to_thread(Codecs, codec, workers, info.vocab_size)
    store.checks.append(codecs.check)
    server.engine.on_ready.append(store.send_pins_soon)
    try:
        imports = Importer(store, _sources(settings), registry)
        await store.warn_of_a_hidden_name()
        await _add_adapters(server, store)
        await imports.resume()
    except BaseException:
        codecs.close()
        await store.close()
        registry.close()
        raise
    return Loaded(info, codec, codecs, workers, store, imports, int(time.time()))


def _sources(settings: Settings) -> Sources:
    try:
        return Sources(settings.sources)
    except ValueError as error:
        raise ModelRejected(str(error)) from error


def _open_registry(settings: Settings, fingerprint: str) -> Registry:
    registry = Registry(settings.data_dir, fingerprint, max_bytes=settings.max_upload_bytes)
    for repair in registry.recovered:
        log.warning("registry repaired", what=repair)
    return registry


def _load_codec(server: Server, workers: Workers) -> TextCodec:
    settings = server.settings
    try:
        return TextCodec.of_model(
            settings.model, workers, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelRejected(f"The tokenizer of {settings.model} cannot be loaded: {error}") from error


async def _add_adapters(server: Server, store: AdapterStore) -> None:
    """The adapters of --adapter. Content that any version of the name has already makes no new version."""
    for name, folder in server.settings.adapters.items():
        try:
            await store.keep_folder(name, folder.resolve(), source=str(folder), by="cli:--adapter")
        except OneBaseError as error:
            raise ModelRejected(f"--adapter {name}={folder}: {error.message}") from error
    await store.pins.send()
