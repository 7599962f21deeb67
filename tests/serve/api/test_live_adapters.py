"""Adapters that change under load, over the real engine: replaced, unloaded, deleted, pinned."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

LONG = 100


@pytest.fixture
def fitting(tmp_path: Path) -> Any:
    """fitting(seed): a LoRA that fits the tiny Llama, and changes what it says."""

    def make(seed: int) -> Path:
        folder = tmp_path / f"fitting{seed}"
        folder.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        key = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"
        tensors = {key.format(layer, "A"): torch.randn(2, 48) for layer in (0, 1)}
        tensors |= {key.format(layer, "B"): torch.randn(32, 2) for layer in (0, 1)}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["down_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


async def say(site: Any, model: str, **options: Any) -> str:
    body = {"prompt": "hello there", "max_tokens": LONG, "temperature": 0, "ignore_eos": True, **options}
    response = await site.complete(model=model, **body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def running(site: Any) -> None:
    async with asyncio.timeout(10):
        while not site.engine.stats.running:
            await asyncio.sleep(0.001)


def start(site: Any, model: str, **options: Any) -> asyncio.Task[Any]:
    body = {"prompt": "hello there", "max_tokens": LONG, "temperature": 0, "ignore_eos": True, **options}
    return asyncio.create_task(site.complete(model=model, **body))


def test_requests_finish_on_the_version_they_began_with(run: Any, open_real: Any, fitting: Any) -> None:
    async def body() -> None:
        async with open_real() as site:
            await site.upload("a", fitting(1))
            await site.upload("b", fitting(2))
            one, two = await say(site, "a"), await say(site, "b")
            assert one != two
            for change in ("upload", "rollback", "rollback"):
                call = start(site, "a")
                await running(site)
                before = (await site.http.get("/v1/adapters/a")).json()["version"]
                if change == "upload":
                    await site.upload("a", fitting(2))
                else:
                    await site.http.post("/v1/adapters/a/rollback")
                after = (await site.http.get("/v1/adapters/a")).json()["version"]
                assert before != after
                texts = {1: one, 2: two}
                assert await say(site, "a") == texts[after], "new requests, with the same prefix"
                assert (await call).json()["choices"][0]["text"] == texts[before]
                assert (await say(site, "a@1"), await say(site, "a@2")) == (one, two)

    run(body())


def test_an_unload_waits_for_the_last_request(run: Any, open_real: Any, fitting: Any) -> None:
    async def body() -> None:
        async with open_real() as site:
            await site.upload("a", fitting(1))
            text = await say(site, "a")
            used = site.engine.stats.adapter_bytes_used
            call = start(site, "a")
            await running(site)
            unload = asyncio.create_task(site.http.post("/v1/adapters/a/unload"))
            await asyncio.sleep(0.05)
            assert call.done() or not unload.done()
            assert (await call).json()["choices"][0]["text"] == text
            card = (await unload).json()
            assert (card["was_resident"], card["aborted"], card["tier"]) == (True, 0, "disk")
            assert site.engine.stats.adapter_bytes_used < used
            assert await say(site, "a") == text

    run(body())


@pytest.mark.parametrize("verb", ["unload", "delete"])
def test_force_ends_running_and_streamed_requests(
    run: Any, open_real: Any, fitting: Any, verb: str, tmp_path: Path
) -> None:
    async def body() -> None:
        async with open_real(max_num_seqs=2) as site:
            await site.upload("a", fitting(1))
            calls = [start(site, "a", n=4), start(site, "a", stream=True), start(site, "base")]
            await running(site)
            while len(site.engine._waiting) < 6:
                await asyncio.sleep(0.001)
            if verb == "unload":
                card = (await site.http.post("/v1/adapters/a/unload?force=true")).json()
                assert card["aborted"] == 5
            else:
                assert (await site.http.delete("/v1/adapters/a?force=true")).status_code == 200
            whole, streamed, base = [await call for call in calls]
            assert whole.status_code == 409
            assert whole.json()["error"]["code"] == "adapter_unloaded"
            assert whole.headers["x-should-retry"] == "false"
            told = streamed.text if streamed.status_code == 200 else json.dumps(streamed.json())
            assert "adapter_unloaded" in told
            assert "[DONE]" not in told
            assert base.status_code == 200, "nobody else's requests are touched"
            async with asyncio.timeout(10):
                while site.engine.stats.resident or (verb == "delete" and any((tmp_path / "data" / "blobs").iterdir())):
                    await asyncio.sleep(0.01)
            status = (await site.complete(model="a", max_tokens=1)).status_code
            assert status == (200 if verb == "unload" else 404)

    run(body())


def test_a_pinned_name_is_on_the_device_whatever_version(run: Any, open_real: Any, fitting: Any) -> None:
    async def resident(site: Any, name: str) -> None:
        async with asyncio.timeout(10):
            while (await site.http.get(f"/v1/adapters/{name}")).json()["tier"] != "device":
                await asyncio.sleep(0.01)

    async def body() -> None:
        async with open_real() as site:
            await site.upload("a", fitting(1))
            await site.upload("a", fitting(2))
            await site.http.patch("/v1/adapters/a", json={"pinned": True})
            await resident(site, "a")
            await site.http.post("/v1/adapters/a/rollback")
            await resident(site, "a")
            assert (await site.http.post("/v1/adapters/a/unload")).status_code == 409
        async with open_real() as site:
            await resident(site, "a")
            assert await say(site, "a")

    run(body())


async def act(site: Any, rng: Random, fitting: Any) -> None:
    name = rng.choice(("a", "b"))
    match rng.randrange(8):
        case 0:
            await site.upload(name, fitting(rng.randrange(4)))
        case 1:
            await site.http.post(f"/v1/adapters/{name}/rollback")
        case 2:
            await site.http.post(f"/v1/adapters/{name}/unload", params={"force": rng.choice(("true", "false"))})
        case 3:
            await site.http.delete(f"/v1/adapters/{name}", params={"force": rng.choice(("true", "false"))})
        case 4:
            await site.http.patch(f"/v1/adapters/{name}", json={"pinned": rng.random() < 0.5})
        case _:
            model = rng.choice((name, f"{name}@1", "base"))
            response = await site.complete(model=model, max_tokens=20, ignore_eos=True, stream=rng.random() < 0.3)
            assert response.status_code in {200, 404, 409}, response.text


@pytest.mark.parametrize("seed", range(2))
def test_the_engine_adds_up_after_random_changes(run: Any, open_real: Any, fitting: Any, seed: int) -> None:
    async def work(site: Any, rng: Random) -> None:
        for _ in range(15):
            await act(site, rng, fitting)

    async def body() -> None:
        async with open_real() as site:
            await asyncio.gather(*(work(site, Random(seed * 10 + index)) for index in range(4)))
            for name in ("a", "b"):
                await site.http.delete(f"/v1/adapters/{name}")
            async with asyncio.timeout(20):
                while site.engine.stats.resident or site.engine.stats.running or site.engine.stats.waiting:
                    await asyncio.sleep(0.01)
            assert site.engine.stats.adapter_bytes_used == 0
        site.engine.engine.check()

    run(body())
