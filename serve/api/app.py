"""The HTTP application: routes, errors and the start-up in the background, around one engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from onebase.serve.api import (
    adapter_changes,
    adapters,
    chat,
    classify,
    completions,
    embeddings,
    health,
    models,
    openapi,
    responses,
    tokenize,
    vllm_compat,
)
from onebase.serve.api.admission import Admission
from onebase.serve.api.auth import LocalHostOnly
from onebase.serve.api.errors import install_handlers
from onebase.serve.api.lifecycle import running
from onebase.serve.api.middleware import HeadAsGet, RequestContext
from onebase.serve.api.state import VERSION, Server
from onebase.serve.config import Settings
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine_metrics import Names
from onebase.serve.metrics import Metrics
from onebase.serve.tenants import read_keys


def create_app(settings: Settings, engine: EngineClient) -> FastAPI:
    """The application; its lifespan starts and stops the engine. ``app.state.server`` is the Server."""
    metrics = Metrics(engine, lambda: _names(server), lambda: _states(server), settings.base_name)
    keyring = read_keys(settings.keys)
    admission = Admission(settings.max_inflight_seqs, settings.max_inflight_tokens, keyring.tenants)
    server = Server(settings, engine, metrics, admission, keyring)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with running(server):
            yield

    app = FastAPI(title="OneBase", version=VERSION, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.server = server
    for module in (
        health,
        models,
        completions,
        chat,
        responses,
        classify,
        embeddings,
        tokenize,
        adapters,
        adapter_changes,
        vllm_compat,
    ):
        app.include_router(module.router)
    install_handlers(app)
    app.add_middleware(LocalHostOnly, settings=settings)
    app.add_middleware(RequestContext, metrics=metrics)  # around those: what is refused is logged and counted too
    app.add_middleware(HeadAsGet)
    app.openapi = partial(openapi.document, app)  # type: ignore[method-assign]
    return app


def _states(server: Server) -> Mapping[str, str]:
    return server.loaded.store.import_states.current if server.loaded is not None else {}


def _names(server: Server) -> Names:
    return server.loaded.store.names if server.loaded is not None else {}
