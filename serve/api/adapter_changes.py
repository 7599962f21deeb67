"""The adapter routes that change a name, or where its current version is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from onebase.adapters.errors import AdapterConflict
from onebase.serve.api.adapter_schemas import AdapterChange, Collect, Rollback, Unloading
from onebase.serve.api.auth import require_admin_key
from onebase.serve.api.body import has_body, json_body, read_json
from onebase.serve.api.cards import adapter_card, report_card
from onebase.serve.api.query import query_parameters, read_query, refuse_unread
from onebase.serve.api.state import server_of

router = APIRouter(dependencies=[Depends(require_admin_key), Depends(refuse_unread)])


@router.patch("/v1/adapters/{name}", openapi_extra=json_body(AdapterChange))
async def change_adapter(request: Request, name: str) -> dict[str, Any]:
    """Pins, labels and aliases; what the body leaves out stays as it is."""
    change = await read_json(request, AdapterChange)
    server = server_of(request)
    entry = await server.require_loaded().store.change(
        name,
        pinned=change.pinned,
        labels=change.labels or {},
        aliases=change.added_aliases,
        dropped=change.dropped_aliases,
    )
    return adapter_card(server, entry)


@router.post("/v1/adapters/{name}/rollback", openapi_extra=json_body(Rollback, required=False))
async def rollback_adapter(request: Request, name: str) -> dict[str, Any]:
    """Makes another version current: the one that the body names, or the one that was current before."""
    version = (await read_json(request, Rollback)).version if has_body(request) else None
    server = server_of(request)
    return adapter_card(server, await server.require_loaded().store.rollback(name, version))


@router.post("/v1/adapters/{name}/load")
async def load_adapter(request: Request, name: str) -> dict[str, Any]:
    """Makes a version resident before the first request needs it. ``tier`` says whether there was room."""
    server = server_of(request)
    return adapter_card(server, await server.require_ready().store.load(name))


@router.post("/v1/adapters/{name}/unload", openapi_extra=query_parameters(Unloading))
async def unload_adapter(request: Request, name: str) -> Response:
    """Frees the device: answers once the bytes are back, after the last request that uses it or, with ``force``, those
    requests' end. The registry keeps it; the next use loads it."""
    asked = read_query(request, Unloading)
    server = server_of(request)
    store = server.require_ready().store
    entry = await store.get(name)
    if entry.digest in await store.pinned_digests():
        raise AdapterConflict(f"{name} is pinned: it would be loaded again at once. Unpin it first.", param="pinned")
    if not asked.wait:
        store.unload_soon(entry.digest, force=asked.force)
        return JSONResponse(adapter_card(server, entry), 202)
    gone = await store.unload(entry.digest, force=asked.force)
    told = {"was_resident": gone.was_resident, "aborted": gone.aborted}
    return JSONResponse(adapter_card(server, entry) | told)


@router.post("/v1/registry/gc", openapi_extra=json_body(Collect, required=False))
async def collect(request: Request) -> dict[str, Any]:
    """Removes old versions, finished imports and files that nothing needs."""
    body = await read_json(request, Collect) if has_body(request) else Collect()
    report = await server_of(request).require_loaded().store.gc(body.keep, dry_run=body.dry_run)
    return report_card(report, dry_run=body.dry_run)
