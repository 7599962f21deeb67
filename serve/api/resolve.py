"""From the names in a request to what the engine applies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from fastapi import Request

from onebase.adapters.errors import AdapterNameInvalid, AdapterNotFound
from onebase.adapters.registry import AdapterEntry
from onebase.serve.api.errors import ApiError, bad_request
from onebase.serve.api.schemas import AdapterScale
from onebase.serve.api.state import Loaded, server_of
from onebase.serve.api.store import AdapterStore
from onebase.serve.api.tokenizer import TextCodec
from onebase.serve.engine.messages import AdapterUse
from onebase.serve.tenants import NOBODY, Tenant

BASE_HEADER = "base"


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request.

    label: the response's ``model``: the name as asked for, joined by + to the names of further adapters.
    metric: the name that metrics count it under: without versions, and one for each set of adapters.
    exact: every adapter with its version, for the response header.
    codec: its tokenizer and chat template. tenant: who asks.
    """

    label: str
    metric: str
    exact: str
    uses: tuple[AdapterUse, ...]
    codec: TextCodec
    tenant: Tenant = NOBODY


async def resolve(request: Request, loaded: Loaded, model: str, extra: Sequence[AdapterScale]) -> Target:
    """What the names mean now; the files of their adapters stay until the response has ended.

    The request is counted under what answers it. Raises ApiError 404 for a name that is neither the base, an adapter,
    nor a version or alias of one.
    """
    server = server_of(request)
    named = [(model, "model", 1.0)] if model != server.settings.base_name else []
    named += [(item.name, f"adapters.{index}.name", item.scale) for index, item in enumerate(extra)]
    found = [(await held(loaded, name, param, request.state.held), name, scale) for name, param, scale in named]
    if len({entry.digest for entry, _, _ in found}) < len(found):
        raise bad_request("The same adapter is named twice: give it once, with the scale you want.", "adapters")
    for entry, _, _ in found:
        loaded.store.uses.add(entry.name, entry.version)
    request.state.model = "+".join(sorted(entry.name for entry, _, _ in found)) or server.settings.base_name
    server.metrics.models.request(request.state.model)
    return Target(
        label="+".join([model, *(item.name for item in extra)]),
        metric=request.state.model,
        exact=", ".join(f"{entry.name}@{entry.version};scale={scale:g}" for entry, _, scale in found) or BASE_HEADER,
        uses=tuple(AdapterUse(entry.digest, str(entry.path), scale, name) for entry, name, scale in found),
        codec=await loaded.codecs.of_all([(entry.digest, entry.path) for entry, _, _ in found]),
        tenant=request.state.tenant,
    )


async def find_model(store: AdapterStore, reference: str, param: str) -> AdapterEntry:
    """Raises ApiError 404."""
    try:
        return await store.get(reference)
    except (AdapterNotFound, AdapterNameInvalid) as error:
        raise _no_model(reference, param) from error


async def held(loaded: Loaded, reference: str, param: str, until: AsyncExitStack) -> AdapterEntry:
    """The adapter, its files held; one that is not registered comes from the resolver first. Raises ApiError 404."""
    try:
        return await loaded.store.hold(reference, until)
    except AdapterNameInvalid as error:
        raise _no_model(reference, param) from error
    except AdapterNotFound:
        if await loaded.imports.resolve(reference) is None:
            raise _no_model(reference, param) from None
    try:
        return await loaded.store.hold(reference, until)
    except AdapterNotFound as error:  # deleted again at once
        raise _no_model(reference, param) from error


def _no_model(reference: str, param: str) -> ApiError:
    message = f"The model {reference!r} does not exist: /v1/models lists what does."
    return ApiError(404, message, param=param, code="model_not_found")
