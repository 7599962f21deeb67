"""The adapter routes: upload, list, versions, load, unload, delete. All need the admin key where one is set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from onebase.adapters.blobs import Blob, Stage
from onebase.adapters.registry import AdapterEntry
from onebase.adapters.sources import allowed_folder
from onebase.serve.api.auth import require_admin_key
from onebase.serve.api.body import content_type, json_body, read_json
from onebase.serve.api.schemas import AdapterSource
from onebase.serve.api.state import Server, server_of
from onebase.serve.api.upload import receive_files

router = APIRouter(dependencies=[Depends(require_admin_key)])


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    server = server_of(request)
    entries = await server.require_loaded().store.refresh()
    return {"object": "list", "data": [_card(server, entry) for entry in entries]}


@router.post("/v1/adapters", status_code=201, openapi_extra=json_body(AdapterSource))
async def add_adapter(request: Request) -> Response:
    """Multipart (``name``, ``files``...) or JSON {name, source}. A name that exists gets a new version."""
    server = server_of(request)
    server.require_ready()
    form = content_type(request) == "multipart/form-data"
    entry = await (_upload(request, server) if form else _from_source(request, server))
    return JSONResponse(_card(server, entry), 201)


@router.get("/v1/adapters/{name}")
async def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """``name`` or ``name@version``."""
    server = server_of(request)
    return _card(server, await server.require_loaded().store.get(name))


@router.get("/v1/adapters/{name}/versions")
async def list_versions(request: Request, name: str) -> dict[str, Any]:
    server = server_of(request)
    entries = await server.require_loaded().store.versions(name)
    return {"object": "list", "data": [_card(server, entry) for entry in entries]}


@router.delete("/v1/adapters/{name}")
async def delete_adapter(request: Request, name: str) -> dict[str, Any]:
    """Removes the name with all its versions. Requests in flight finish; the files go with the last of them."""
    removed = await server_of(request).require_loaded().store.delete(name)
    return {"name": name, "object": "adapter", "deleted": True, "versions": [entry.version for entry in removed]}


@router.post("/v1/adapters/{name}/load")
async def load_adapter(request: Request, name: str) -> dict[str, Any]:
    """Makes a version resident before the first request needs it. ``tier`` says whether there was room."""
    server = server_of(request)
    entry = await server.require_ready().store.load(name)
    return _card(server, entry)


@router.post("/v1/adapters/{name}/unload")
async def unload_adapter(request: Request, name: str) -> dict[str, Any]:
    """Frees the device once no running request uses the adapter. The registry keeps it; the next use loads it."""
    server = server_of(request)
    store = server.require_ready().store
    entry = await store.get(name)
    was_resident = await store.unload(entry.digest)
    return {**_card(server, entry), "tier": "disk", "was_resident": was_resident}


async def _upload(request: Request, server: Server) -> AdapterEntry:
    store = server.require_ready().store
    async with _in_thread(store.registry.stage()) as stage:
        name = store.check_new_name(await receive_files(request, stage, server.settings.max_upload_bytes))
        blob: Blob = await asyncio.to_thread(stage.finish)
    return await store.add(name, blob, source="upload")


async def _from_source(request: Request, server: Server) -> AdapterEntry:
    body = await read_json(request, AdapterSource)
    folder = await asyncio.to_thread(allowed_folder, body.source, server.settings.allow_path)
    return await server.require_ready().store.add_folder(body.name, folder, source=body.source)


@asynccontextmanager
async def _in_thread(stage: AbstractContextManager[Stage]) -> AsyncGenerator[Stage, None]:
    """The stage makes and removes a folder of files, which may be large."""
    opened = await asyncio.to_thread(stage.__enter__)
    try:
        yield opened
    finally:
        await asyncio.shield(asyncio.to_thread(stage.__exit__, None, None, None))


def _card(server: Server, entry: AdapterEntry) -> dict[str, Any]:
    resident = server.engine.stats.resident
    return {
        "name": entry.name,
        "object": "adapter",
        "version": entry.version,
        "digest": entry.digest,
        "family": entry.family,
        "rank": entry.rank,
        "bytes": entry.nbytes,
        "source": entry.source,
        "created": int(entry.created),
        "pinned": entry.pinned,
        "tier": "device" if entry.digest in resident else "disk",
    }
