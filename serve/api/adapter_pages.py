"""GET /v1/adapters: pages of what serves, or of the imports that do not serve yet."""

from __future__ import annotations

import asyncio
from typing import Any

from onebase.adapters.errors import AdapterNotFound
from onebase.adapters.registry import AdapterState, Import
from onebase.serve.api.adapter_schemas import AdapterFilter
from onebase.serve.api.cards import Card, adapter_card, import_card
from onebase.serve.api.state import Server
from onebase.serve.api.store import AdapterStore


async def adapter_page(server: Server, wanted: AdapterFilter) -> dict[str, Any]:
    """Without ``state``: names that have a version. With ``ready``: those of them with no import under way."""
    store = server.require_loaded().store
    if wanted.state is None or wanted.state == "ready":
        return await _serving(server, store, wanted)
    return await _importing(server, store, wanted, AdapterState(wanted.state))


async def _serving(server: Server, store: AdapterStore, wanted: AdapterFilter) -> dict[str, Any]:
    page = await store.page(
        after=wanted.after, limit=wanted.limit, prefix=wanted.prefix, labels=wanted.labels, pinned=wanted.pinned
    )
    jobs = {job.name: job for job in await store.under_way([entry.name for entry in page.entries])}
    cards = [adapter_card(server, entry, jobs.get(entry.name)) for entry in page.entries]
    return _page([card for card in cards if wanted.state in (None, card["state"])], page.next)


async def _importing(server: Server, store: AdapterStore, wanted: AdapterFilter, state: AdapterState) -> dict[str, Any]:
    """Names whose last import stands so. As above, labels and pins leave some of a page out."""
    found = await store.last_imports(state, after=wanted.after, prefix=wanted.prefix, limit=wanted.limit + 1)
    jobs, more = found[: wanted.limit], len(found) > wanted.limit
    cards = await asyncio.gather(*(_card(server, store, job) for job in jobs))
    shown = [card for card in cards if card["state"] == state and _passes(card, wanted)]
    return _page(shown, jobs[-1].name if more else None)


async def _card(server: Server, store: AdapterStore, job: Import) -> Card:
    try:
        return adapter_card(server, await store.get(job.name), job)
    except AdapterNotFound:
        return import_card(job)


def _passes(card: Card, wanted: AdapterFilter) -> bool:
    labels: dict[str, str] = card["labels"]
    return wanted.pinned in (None, card["pinned"]) and wanted.labels.items() <= labels.items()


def _page(cards: list[Card], following: str | None) -> dict[str, Any]:
    return {"object": "list", "data": cards, "has_more": following is not None, "next": following}
