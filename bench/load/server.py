"""What a server says of itself before the run: its models, its version, its vocabulary."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from onebase.bench.load.http import Address

TIMEOUT = 30.0
_MOST_PAGES = 10_000


class ServerUnusable(RuntimeError):
    """The server cannot be asked, or has not what the run needs. The message says which."""


@dataclass(frozen=True, slots=True)
class Discovered:
    """base: the model that is no adapter. adapters: those whose parent the server names, in its order. vocabulary: 0
    where it does not tell."""

    base: str
    adapters: tuple[str, ...]
    version: str | None
    vocabulary: int


@asynccontextmanager
async def caller(url: str, key: str) -> AsyncIterator[httpx.AsyncClient]:
    """For all but the load itself. Paths are relative to the server's root; no proxy is asked."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    root = Address.parse(url).url
    async with httpx.AsyncClient(base_url=root, headers=headers, timeout=TIMEOUT, trust_env=False) as client:
        yield client


async def discover(client: httpx.AsyncClient) -> Discovered:
    """Raises ServerUnusable."""
    try:
        cards = await _models(client)
        version = await _told(client, "/version")
        tokenizer = await _told(client, "/tokenizer_info")
    except (httpx.HTTPError, ValueError) as error:
        raise ServerUnusable(f"url: {client.base_url}: {type(error).__name__} {error}".rstrip()) from None
    adapters = tuple(str(card["id"]) for card in cards if card.get("parent"))
    bases = [str(card["id"]) for card in cards if not card.get("parent")]
    size = tokenizer.get("vocab_size")
    told = version.get("version")
    return Discovered(
        base=bases[0] if bases else "",
        adapters=adapters,
        version=told if isinstance(told, str) else None,
        vocabulary=size if isinstance(size, int) and size > 0 else 0,
    )


def choose(found: Discovered, model: str | None, adapters: int | None, names: Sequence[str]) -> tuple[str, ...]:
    """The models to draw from: those named; or so many adapters; by default all; the base where there is none.

    Raises ServerUnusable.
    """
    if names:
        return tuple(names)
    if adapters is not None and adapters > len(found.adapters):
        raise ServerUnusable(f"adapters: {adapters} asked for; the server names {len(found.adapters)} in /v1/models")
    chosen = found.adapters if adapters is None and model is None else found.adapters[: adapters or 0]
    base = model or found.base
    if not chosen and not base:
        raise ServerUnusable("model: the server names none in /v1/models; say which")
    return chosen or (base,)


async def _models(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """All pages, where there are several."""
    cards: list[dict[str, Any]] = []
    after: str | None = None
    for _ in range(_MOST_PAGES):
        answer = await client.get("/v1/models", params={} if after is None else {"after": after})
        if answer.status_code != 200:
            raise ServerUnusable(f"url: {answer.url} answered {answer.status_code}: {answer.text[:300]}")
        page = answer.json()
        if not isinstance(page, dict) or not isinstance(page.get("data"), list):
            raise ServerUnusable(f"url: {answer.url} has no list of models")
        cards += [card for card in page["data"] if isinstance(card, dict) and "id" in card]
        after = page.get("next") if page.get("has_more") else None
        if not isinstance(after, str):
            break
    return cards


async def _told(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    """Nothing, where the server does not know the path."""
    answer = await client.get(path)
    if answer.status_code != 200:
        return {}
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
