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
    if wanted.state in (None, AdapterState.READY):
        return await _serving(server, store, wanted)
    return await _importing(server, store, wanted)


async def _serving(server: Server, store: AdapterStore, wanted: AdapterFilter) -> dict[str, Any]:
    page = await store.page(
        after=wanted.after, limit=wanted.limit, prefix=wanted.prefix, labels=wanted.labels, pinned=wanted.pinned
    )
    jobs = {job.name: job for job in await store.imports(unfinished=True)}
    cards = [adapter_card(server, entry, jobs.get(entry.name)) for entry in page.entries]
    return _page([card for card in cards if wanted.state in (None, card["state"])], page.next)


async def _importing(server: Server, store: AdapterStore, wanted: AdapterFilter) -> dict[str, Any]:
    """Imports are few: the newest of each name, in memory."""
    newest: dict[str, Import] = {}
    for job in await store.imports():
        newest.setdefault(job.name, job)
    jobs = [newest[name] for name in sorted(newest) if newest[name].state == wanted.state]
    jobs = [job for job in jobs if job.name > (wanted.after or "") and job.name.startswith(wanted.prefix or "")]
    cards = await asyncio.gather(*(_card(server, store, job) for job in jobs))
    shown = [card for card in cards if card["state"] == wanted.state and _passes(card, wanted)]
    more = len(shown) > wanted.limit
    return _page(shown[: wanted.limit], shown[wanted.limit - 1]["name"] if more else None)


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
