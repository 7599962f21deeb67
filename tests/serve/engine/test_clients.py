"""What the HTTP layer may rely on, whatever the engine lives in: a thread or a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onebase.adapters.errors import AdapterUnloaded, EngineDead, ModelRejected, RequestRejected, StorageFailed
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.inprocess import InProcessEngine
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.quarantine import MOST_CRASHES, Quarantine
from onebase.serve.engine.supervisor import SupervisedEngine

KINDS: dict[str, Callable[[EngineConfig], EngineClient]] = {"thread": InProcessEngine, "process": SupervisedEngine}


def _request(key: str, max_tokens: int = 6, *adapters: AdapterUse) -> Request:
    return Request(key, (5, 6, 7), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), adapters)


@asynccontextmanager
async def _running(kind: str, model: Path) -> AsyncIterator[Any]:
    client = KINDS[kind](EngineConfig(str(model), device="cpu", kv_memory=0.01, adapter_memory=0.01))
    try:
        await client.start()
        yield client
    finally:
        await client.stop()


async def _tokens(client: EngineClient, request: Request) -> list[int]:
    return [token async for output in client.generate(request) for token in output.tokens]


async def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterUse:
    folder = tmp_path_factory.mktemp("adapter")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    save_file(
        {f"{prefix}_A.weight": torch.ones(2, 64), f"{prefix}_B.weight": torch.ones(64, 2)}, folder / "a.safetensors"
    )
    (folder / "a.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return AdapterUse("d" * 64, str(folder))


async def _contract(client: EngineClient, adapter: AdapterUse) -> None:
    assert client.ready
    assert client.info is not None
    assert client.info.architecture == "LlamaForCausalLM"
    alone = await _tokens(client, _request("a"))
    assert len(alone) == 6
    assert await asyncio.gather(*(_tokens(client, _request(f"b{i}")) for i in range(5))) == [alone] * 5

    ready = await client.load_adapter(adapter)
    assert (ready.family, ready.rank, ready.sites) == ("LORA", 2, 1)
    await _tokens(client, _request("c", 6, adapter))
    await _until(lambda: client.tier(adapter.digest) == "device")
    assert adapter.digest in client.stats.resident
    assert (await client.unload_adapter(adapter.digest)).was_resident
    assert not (await client.unload_adapter(adapter.digest)).was_resident
    await _until(lambda: client.tier(adapter.digest) == "disk")
    client.set_pins([adapter])
    await _until(lambda: client.stats.pinned == (adapter.digest,))
    client.set_pins([])
    await _until(lambda: client.stats.pinned == ())
    lost = asyncio.create_task(_tokens(client, _request("g", 240, adapter)))
    await _until(lambda: client.stats.running == 1)
    assert (await client.unload_adapter(adapter.digest, force=True)).aborted == 1
    with pytest.raises(AdapterUnloaded):
        await lost
    with pytest.raises(StorageFailed):
        await client.load_adapter(AdapterUse("e" * 64, "/nowhere"))
    with pytest.raises(StorageFailed):
        await _tokens(client, _request("d", 6, AdapterUse("e" * 64, "/nowhere")))
    with pytest.raises(RequestRejected, match="0 to 127"):
        await _tokens(client, Request("e", (500,), SamplingParams()))

    left = client.generate(_request("f", 200))
    await anext(left)
    await _until(lambda: client.stats.running == 1)
    await left.aclose()
    await _until(lambda: client.stats.running == 0)
    assert await _tokens(client, _request("f")) == alone, "the id is free again"


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract(kind: str, checkpoint: Callable[..., Path], adapter: AdapterUse) -> None:
    async def body() -> None:
        async with _running(kind, checkpoint("llama")) as client:
            await _contract(client, adapter)
            lost = asyncio.create_task(_tokens(client, _request("last", 240)))
            await _until(lambda: client.stats.running == 1)
            await client.stop()
            with pytest.raises(EngineDead):
                await lost
            with pytest.raises(EngineDead):
                await _tokens(client, _request("late"))

    asyncio.run(body())


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_cannot_be_served_fails_the_start(kind: str, tmp_path: Path) -> None:
    async def body() -> None:
        async with _running(kind, tmp_path / "nothing"):
            pytest.fail("it started")

    with pytest.raises(ModelRejected, match="cannot be read"):
        asyncio.run(body())


def test_a_request_that_kills_the_engine_is_refused_in_the_end(checkpoint: Callable[..., Path]) -> None:
    async def crash(client: SupervisedEngine, attempt: int) -> None:
        stream = client.generate(_request(f"poison-{attempt}", 240))
        await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            async for _ in stream:
                pass
        await _until(lambda: client.ready)

    async def body() -> None:
        async with _running("process", checkpoint("llama")) as client:
            for attempt in range(MOST_CRASHES):
                await crash(client, attempt)
            assert client.restarts == MOST_CRASHES
            with pytest.raises(RequestRejected, match="died"):
                await _tokens(client, _request("poison-again", 240))
            other = Request("other", (9, 9), SamplingParams(max_tokens=3, ignore_eos=True))
            assert len(await _tokens(client, other)) == 3

    asyncio.run(body())


def test_finishing_once_clears_a_request() -> None:
    quarantine = Quarantine()
    suspect = _request("x")
    for _ in range(MOST_CRASHES - 1):
        quarantine.crashed([suspect, suspect])
    quarantine.check(suspect)
    quarantine.finished(_request("y"))
    quarantine.crashed([suspect])
    quarantine.check(suspect)
