"""The adapter routes that find, add and remove. All need the admin key where one is set."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from onebase.adapters.errors import AdapterNotFound
from onebase.adapters.registry import AdapterState
from onebase.serve.api.adapter_pages import adapter_page
from onebase.serve.api.adapter_schemas import AdapterFilter, AdapterSource, Forcing, VersionRange, Waiting
from onebase.serve.api.auth import caller, require_admin_key
from onebase.serve.api.body import content_type, form_body, read_json
from onebase.serve.api.cards import adapter_card, import_card
from onebase.serve.api.errors import bad_request
from onebase.serve.api.query import query_parameters, read_query, refuse_unread
from onebase.serve.api.state import Loaded, Server, server_of
from onebase.serve.api.upload import receive_adapter

router = APIRouter(dependencies=[Depends(require_admin_key), Depends(refuse_unread)])


@router.get("/v1/adapters", openapi_extra=query_parameters(AdapterFilter))
async def list_adapters(request: Request) -> dict[str, Any]:
    """By name, in pages: ``next`` of one is ``after`` of the following."""
    return await adapter_page(server_of(request), read_query(request, AdapterFilter))


@router.post("/v1/adapters", status_code=201, openapi_extra=form_body(AdapterSource) | query_parameters(Waiting))
async def add_adapter(request: Request) -> Response:
    """Multipart (``name``, ``files``...) or JSON {name, source, revision}. A name that exists gets a new version."""
    wait = read_query(request, Waiting).wait
    server = server_of(request)
    loaded = server.require_ready()
    if content_type(request) == "multipart/form-data":
        if not wait:
            raise bad_request("wait: only what the server fetches itself can be left to the background.", "wait")
        name, blob = await receive_adapter(request, loaded.store)
        entry = await loaded.store.add(name, blob, source="upload", by=caller(request))
        return JSONResponse(adapter_card(server, entry), 201)
    return await _import(request, server, loaded, wait=wait)


@router.get("/v1/adapters/{name}")
async def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """``name``, ``name@3``, ``name@sha256:...`` or an alias; also a name whose first import is under way or failed."""
    server = server_of(request)
    store = server.require_loaded().store
    job = await store.last_import(name)
    try:
        return adapter_card(server, await store.get(name), job)
    except AdapterNotFound:
        if job is None or job.state is AdapterState.READY or job.state is AdapterState.DELETED:
            raise
        return import_card(job)


@router.get("/v1/adapters/{name}/versions", openapi_extra=query_parameters(VersionRange))
async def list_versions(request: Request, name: str) -> dict[str, Any]:
    """Of a name, oldest first, in pages: ``next`` of one is ``after`` of the following."""
    server, wanted = server_of(request), read_query(request, VersionRange)
    store = server.require_loaded().store
    found, current = await store.some_versions(name, wanted.after, wanted.limit + 1), await store.get(name)
    entries, more = found[: wanted.limit], len(found) > wanted.limit
    cards = [adapter_card(server, entry) | {"current": entry.version == current.version} for entry in entries]
    return {"object": "list", "data": cards, "has_more": more, "next": entries[-1].version if more else None}


@router.delete("/v1/adapters/{name}", openapi_extra=query_parameters(Forcing))
async def delete_adapter(request: Request, name: str) -> dict[str, Any]:
    """Removes the name with all its versions. Requests in flight finish, or with ``force`` fail; then the files go."""
    force = read_query(request, Forcing).force
    if "@" in name:
        raise bad_request("A single version cannot be removed: POST /v1/registry/gc removes old ones.", "name")
    removed = await server_of(request).require_loaded().store.delete(name, force=force)
    return {"name": name, "object": "adapter", "deleted": True, "versions": [entry.version for entry in removed]}


async def _import(request: Request, server: Server, loaded: Loaded, *, wait: bool) -> Response:
    """The server fetches the source itself: 201 once that is done, or 202 at once where the client does not wait."""
    body = await read_json(request, AdapterSource)
    loaded.store.check_new_name(body.name)
    job = await loaded.imports.start(body.name, body.source, body.revision, caller(request))
    if not wait:
        return JSONResponse(import_card(job), 202)
    return JSONResponse(adapter_card(server, await loaded.imports.wait(job.id)), 201)
