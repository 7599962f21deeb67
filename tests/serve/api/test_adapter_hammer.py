"""Random changes and requests at once, over the real registry: afterwards nothing is held, lost or left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

NAMES = ("a", "b", "c")
CONTENTS = 4
WORKERS, STEPS = 6, 40
ALLOWED = {200, 201, 202, 404, 409}


async def act(site: Any, rng: Random, folders: list[Path]) -> int:
    """One random call; its status."""
    name = rng.choice(NAMES)
    path = f"/v1/adapters/{name}"
    match rng.randrange(10):
        case 0 | 1:
            response = await site.upload(name, rng.choice(folders))
        case 2:
            response = await site.http.post(f"{path}/rollback")
        case 3:
            response = await site.http.delete(path, params={"force": rng.choice(("true", "false"))})
        case 4:
            response = await site.http.post(f"{path}/unload", params={"wait": rng.choice(("true", "false"))})
        case 5:
            change = {"pinned": rng.random() < 0.3, "aliases": {f"{name}-stable": rng.choice((1, 2, "current", None))}}
            response = await site.http.patch(path, json=change)
        case 6:
            response = await site.post("/v1/registry/gc", keep=rng.choice((0, 1, 5)))
        case _:
            model = rng.choice((name, f"{name}@1", f"{name}-stable"))
            response = await site.complete(model=model, max_tokens=2, stream=rng.random() < 0.3)
    return int(response.status_code)


async def work(site: Any, seed: int, folders: list[Path]) -> set[int]:
    rng = Random(seed)
    return {await act(site, rng, folders) for _ in range(STEPS)}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_behind(run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        folders = [adapter_folder(f"content{index}", index) for index in range(CONTENTS)]
        async with open_site() as site:
            site.engine.delay = 0.001
            seen = await asyncio.gather(*(work(site, seed * WORKERS + index, folders) for index in range(WORKERS)))
            assert set().union(*seen) <= ALLOWED
            store = site.server.loaded.store
            await site.idle()
            assert (store._holds._held, store._holds._retired) == ({}, set())
            named: dict[str, set[str]] = {name: set() for name in NAMES}
            for name in NAMES:
                if (await site.http.get(f"/v1/adapters/{name}")).status_code == 200:
                    cards = (await site.http.get(f"/v1/adapters/{name}/versions")).json()["data"]
                    named[name] = {card["digest"] for card in cards}
            digests = set().union(*named.values())
            assert {blob.name for blob in (tmp_path / "data" / "blobs").iterdir()} == digests
            assert list((tmp_path / "data" / "staging").iterdir()) == []
            assert set(site.engine.stats.resident) <= digests, "what has no version is not on the device"
            current = {name for names in store.names.values() for name in names}
            assert current <= {name for name in NAMES if named[name]}
            pinned = await asyncio.to_thread(store.registry.pinned)
            assert {use.digest for use in site.engine.pins} == {entry.digest for entry in pinned}
            admission = site.server.admission
            assert (admission.sequences.taken, admission.tokens.taken) == (0, 0)

    run(body())
