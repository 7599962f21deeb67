"""vLLM's load and unload routes, with its texts and status codes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import AdapterRejected


def test_vllm_routes(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        folder = adapter_folder()
        other = adapter_folder("other", 5)
        async with open_site(allow_path=(folder.parent,)) as site:

            async def load(**body: Any) -> Any:
                return await site.post("/v1/load_lora_adapter", **{"lora_name": "a", "lora_path": str(folder), **body})

            response = await load()
            assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' added successfully.")
            response = await load()
            assert response.status_code == 400
            assert "already been loaded" in response.json()["error"]["message"]
            assert (await load(lora_path=str(other), load_inplace=True)).status_code == 200
            assert (await site.http.get("/v1/adapters/a")).json()["version"] == 2
            assert (await load(lora_name="b", lora_path=str(folder / "nope"))).status_code == 404
            assert (await load(lora_name="b", lora_path="/etc")).status_code == 400
            assert (await load(lora_name="../b")).status_code == 400
            assert (await load(lora_name="base")).status_code == 400
            assert (await load(lora_name="")).status_code == 400
            assert (await site.post("/v1/load_lora_adapter", lora_name="b")).status_code == 400
            site.engine.load_failure = AdapterRejected("no")
            assert (await load(lora_name="b")).status_code == 400

            response = await site.post("/v1/unload_lora_adapter", lora_name="a")
            assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
            assert (await site.post("/v1/unload_lora_adapter", lora_name="a")).status_code == 404
            assert (await site.post("/v1/unload_lora_adapter")).status_code == 400
            assert (await site.complete(model="a")).status_code == 404

    run(body())


@pytest.mark.parametrize("inplace", [False, True])
def test_an_alias_is_not_loaded(run: Any, open_site: Any, adapter_folder: Any, inplace: bool) -> None:
    async def body() -> None:
        folder = adapter_folder()
        async with open_site(allow_path=(folder.parent,)) as site:
            await site.upload("a", folder)
            await site.http.patch("/v1/adapters/a", json={"aliases": {"stable": 1}})
            given = {"lora_name": "stable", "lora_path": str(folder), "load_inplace": inplace}
            response = await site.post("/v1/load_lora_adapter", **given)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "lora_name"
            assert "is an alias of 'a'" in response.json()["error"]["message"]

    run(body())


def test_load_inplace_is_for_new_requests_at_once(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        first, second = adapter_folder("first", 1), adapter_folder("second", 2)
        async with open_site(allow_path=(first.parent,)) as site:

            async def load(folder: Path, **options: Any) -> None:
                response = await site.post("/v1/load_lora_adapter", lora_name="a", lora_path=str(folder), **options)
                assert response.status_code == 200, response.text

            await load(first)
            site.engine.pause = asyncio.Event()
            calls = [asyncio.create_task(site.complete(model="a", max_tokens=1))]
            while len(site.engine.requests) < 1:
                await asyncio.sleep(0.001)
            await load(second, load_inplace=True)
            calls.append(asyncio.create_task(site.complete(model="a", max_tokens=1)))
            while len(site.engine.requests) < 2:
                await asyncio.sleep(0.001)
            old, new = (request.adapters[0] for request in site.engine.requests)
            assert old.digest != new.digest
            assert (Path(old.path) / "adapter_config.json").is_file()
            site.engine.pause.set()
            assert [(await call).headers["x-onebase-adapters"] for call in calls] == ["a@1;scale=1", "a@2;scale=1"]

    run(body())
