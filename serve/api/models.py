"""GET /v1/models: the base first, then adapters' current versions with their parent and root."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.adapters.registry import AdapterEntry
from onebase.serve.api.adapter_schemas import ModelFilter
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.query import query_parameters, read_query, refuse_unread
from onebase.serve.api.resolve import find_model
from onebase.serve.api.state import Loaded, Server, server_of
from onebase.serve.api.stream import encode_json
from onebase.serve.api.writing import written

CARD_VALUES = 8  # what an adapter's card has

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


@router.get("/v1/models", openapi_extra=query_parameters(ModelFilter))
async def list_models(request: Request) -> Response:
    """In pages of adapters, by name: the base stands before the first one. ``next`` of one is ``after`` of the next."""
    wanted = read_query(request, ModelFilter)
    server = server_of(request)
    loaded = server.require_loaded()
    page = await loaded.store.page(after=wanted.after, limit=wanted.limit)

    def write() -> bytes:
        cards = [_adapter_card(server, loaded, entry, entry.name) for entry in page.entries]
        first = [] if wanted.after else [_base_card(server, loaded)]
        more = {"has_more": page.next is not None, "next": page.next}
        return encode_json({"object": "list", "data": [*first, *cards], **more})

    return Response(await written(server, CARD_VALUES * len(page.entries), write), media_type="application/json")


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """The base, an adapter, a version of one, or an alias."""
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
