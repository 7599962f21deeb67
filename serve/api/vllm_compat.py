"""vLLM's POST /v1/load_lora_adapter and /v1/unload_lora_adapter: its fields, texts and status codes 200, 400, 404."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import APIRouter, Depends, Request
from starlette.responses import PlainTextResponse

from onebase.adapters.errors import (
    AdapterConflict,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRejected,
    AdapterTooLarge,
)
from onebase.adapters.sources import allowed_folder
from onebase.serve.api.adapter_schemas import LoadLora, UnloadLora
from onebase.serve.api.auth import caller, require_admin_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.errors import ApiError, bad_request
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.state import server_of
from onebase.serve.api.store import AdapterStore

router = APIRouter(dependencies=[Depends(require_admin_key), Depends(refuse_unread)])

T = TypeVar("T")


@router.post("/v1/load_lora_adapter", openapi_extra=json_body(LoadLora))
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """Any family, not only LoRA. ``load_inplace`` adds a version; without it a name that exists is 400."""
    body = await read_json(request, LoadLora)
    server = server_of(request)
    store = server.require_ready().store
    if not body.load_inplace and await _exists(store, body.lora_name):
        raise bad_request(
            f"The lora adapter '{body.lora_name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True.",
            "lora_name",
        )
    folder = await _as_vllm(asyncio.to_thread(allowed_folder, body.lora_path, server.settings.allow_path))
    await _as_vllm(store.add_folder(body.lora_name, folder, source=body.lora_path, by=caller(request)))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=json_body(UnloadLora))
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Removes the name with all its versions, as DELETE /v1/adapters/{name} does."""
    body = await read_json(request, UnloadLora)
    await _as_vllm(server_of(request).require_ready().store.delete(body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _exists(store: AdapterStore, name: str) -> bool:
    """Raises ApiError 400 for what no adapter can be called: the base's name, or an alias."""
    try:
        found = await store.get(store.check_new_name(name))
    except AdapterNotFound:
        return False
    except AdapterConflict as error:
        raise bad_request(error.message, "lora_name") from error
    if found.name != name:
        raise bad_request(f"{name!r} is an alias of {found.name!r}.", "lora_name")
    return True


async def _as_vllm(work: Awaitable[T]) -> T:
    """vLLM answers 400 where OneBase would say 409 or 413, and calls the fields lora_name and lora_path."""
    try:
        return await work
    except AdapterNotFound as error:
        raise ApiError(404, error.message, param=_field(error.param), code="adapter_not_found") from error
    except (AdapterConflict, AdapterNameInvalid, AdapterRejected, AdapterTooLarge) as error:
        raise bad_request(error.message, _field(error.param)) from error


def _field(param: str | None) -> str | None:
    return {"name": "lora_name", "source": "lora_path"}.get(param or "", param)
