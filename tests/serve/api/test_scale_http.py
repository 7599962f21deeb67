"""Ten thousand adapters over HTTP: pages are quick, and nothing in memory grows with the registry."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

from onebase.adapters.registry import Registry

MANY = 10_000
CONTENTS = 400
PAGE_SECONDS = 0.05


def fill(root: Path, base: str) -> None:
    """Names over a few contents, one version each; a hundredth is pinned. Rows are written at once."""
    registry = Registry(root, base)
    digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(CONTENTS)]
    for digest in digests:
        folder = root / "blobs" / digest
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes(b"{}")
    with registry._db.transaction():
        for index in range(MANY):
            name = f"customer-{index:05}"
            pinned = index % 100 == 0
            registry._db.run(
                "INSERT INTO names (base, name, current, last, pinned) VALUES (?, ?, 1, 1, ?)", base, name, pinned
            )
            registry._db.run(
                "INSERT INTO versions VALUES (?, ?, 1, ?, 'LORA', 8, 1000, 'upload', 1.0, NULL, '')",
                *(base, name, digests[index % CONTENTS]),
            )
            registry._db.run("INSERT INTO labels VALUES (?, ?, 'team', ?)", base, name, f"t{index % 50}")
    registry.close()


async def seconds(site: Any, path: str) -> float:
    """The median of seven."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        assert (await site.http.get(path)).status_code == 200
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def walk(site: Any, path: str, limit: int) -> int:
    """Through all pages; how many cards there were."""
    count, after = 0, {}
    while True:
        page = (await site.http.get(path, params={"limit": limit, **after})).json()
        count += len(page["data"])
        if not page["has_more"]:
            return count
        after = {"after": page["next"]}


def test_pages_of_ten_thousand(run: Any, open_site: Any, tmp_path: Path) -> None:
    async def body() -> None:
        await asyncio.to_thread(fill, tmp_path / "data", "f" * 64)
        started = time.perf_counter()
        async with open_site() as site:
            assert time.perf_counter() - started < 5
            for path in (
                "/v1/adapters",
                "/v1/adapters?after=customer-05000",
                "/v1/adapters?prefix=customer-09",
                "/v1/adapters?label=team:t7",
                "/v1/adapters?pinned=true",
                "/v1/adapters/customer-09999",
                "/v1/models?limit=100",
                "/metrics",
            ):
                taken = await seconds(site, path)

                assert taken < PAGE_SECONDS, path
            assert await walk(site, "/v1/adapters", 1000) == MANY
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            assert await walk(site, "/v1/models", 1000) == MANY + 1
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < 1 << 20, "nothing of a list is kept"
            tracemalloc.stop()

    run(body())


def test_memory_follows_what_is_in_play(run: Any, open_site: Any, tmp_path: Path) -> None:
    async def body() -> None:
        await asyncio.to_thread(fill, tmp_path / "data", "f" * 64)
        async with open_site() as site:
            for index in range(CONTENTS):
                await site.complete(model=f"customer-{index:05}", max_tokens=1)
            store = site.server.loaded.store
            assert len(store.names) <= 256, "what is neither on the device nor in host memory is forgotten"
            assert store._holds._held == {}
            text = (await site.http.get("/metrics")).text
            assert text.count("onebase_requests_total{") == 201

    run(body())
