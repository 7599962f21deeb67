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
from onebase.serve.engine.messages import AdapterUse

BASE_HEADER = "base"


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request.

    label: the response's ``model``: the name as asked for, joined by + to the names of further adapters.
    metric: the name that metrics count it under, without a version.
    exact: every adapter with its version, for the response header.
    """

    label: str
    metric: str
    exact: str
    uses: tuple[AdapterUse, ...]


async def resolve(request: Request, loaded: Loaded, model: str, extra: Sequence[AdapterScale]) -> Target:
    """What the names mean now; the files of their adapters stay until the response has ended.

    The request is counted under what answers it. Raises ApiError 404 for a name that is neither the base, an adapter,
    nor a version or alias of one.
    """
    server = server_of(request)
    target = await _target(loaded.store, server.settings.base_name, model, extra, request.state.held)
    request.state.model = target.metric
    server.metrics.request(target.metric)
    return target


async def _target(
    store: AdapterStore, base_name: str, model: str, extra: Sequence[AdapterScale], until: AsyncExitStack
) -> Target:
    found: list[tuple[AdapterEntry, float]] = []
    if model != base_name:
        found.append((await find_model(store, model, "model", until), 1.0))
    for index, item in enumerate(extra):
        found.append((await find_model(store, item.name, f"adapters.{index}.name", until), item.scale))
    for entry, _ in found:
        store.uses.add(entry.name, entry.version)
    asked = [model, *(item.name for item in extra)][-len(found) or None :]
    if len({entry.digest for entry, _ in found}) < len(found):
        raise bad_request("The same adapter is named twice: give it once, with the scale you want.", "adapters")
    return Target(
        label="+".join([model, *(item.name for item in extra)]),
        metric="+".join(entry.name for entry, _ in found) or base_name,
        exact=", ".join(f"{entry.name}@{entry.version};scale={scale:g}" for entry, scale in found) or BASE_HEADER,
        uses=tuple(
            AdapterUse(entry.digest, str(entry.path), scale, name)
            for name, (entry, scale) in zip(asked, found, strict=False)
        ),
    )


async def find_model(
    store: AdapterStore, reference: str, param: str, until: AsyncExitStack | None = None
) -> AdapterEntry:
    """The adapter, held if ``until`` is given. Raises ApiError 404."""
    try:
        return await (store.get(reference) if until is None else store.hold(reference, until))
    except (AdapterNotFound, AdapterNameInvalid) as error:
        message = f"The model {reference!r} does not exist: /v1/models lists what does."
        raise ApiError(404, message, param=param, code="model_not_found") from error
