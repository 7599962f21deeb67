"""GET /v1/models: the base first, then every adapter's current version with its parent and root."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from onebase.adapters.registry import AdapterEntry
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.resolve import find_model
from onebase.serve.api.state import Loaded, Server, server_of

router = APIRouter(dependencies=[Depends(require_api_key)])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    server = server_of(request)
    loaded = server.require_loaded()
    entries = await loaded.store.refresh()
    cards = [_base_card(server, loaded), *(_adapter_card(server, loaded, entry, entry.name) for entry in entries)]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    server = server_of(request)
    loaded = server.require_loaded()
    if model == server.settings.base_name:
        return _base_card(server, loaded)
    return _adapter_card(server, loaded, await find_model(loaded.store, model, "model"), model)


def _base_card(server: Server, loaded: Loaded) -> dict[str, Any]:
    return _card(server.settings.base_name, loaded.created, server.settings.model, None, loaded)


def _adapter_card(server: Server, loaded: Loaded, entry: AdapterEntry, name: str) -> dict[str, Any]:
    return _card(name, int(entry.created), entry.source, server.settings.base_name, loaded)


def _card(name: str, created: int, root: str, parent: str | None, loaded: Loaded) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "onebase",
        "root": root,
        "parent": parent,
        "max_model_len": loaded.info.max_model_len,
    }
