"""The engine under pressure: whatever the schedule, a request says what it says alone, and everything is given back."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.kernels.attention import select_attention
from onebase.kernels.dispatch import select_kernels
from onebase.serve.engine import tier
from onebase.serve.engine.messages import AdapterReady, LoadAdapter
from onebase.serve.model import loader

from .programs import save_lora

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def adapters(make_driver: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five LoRA folders of ranks 1 to 9 on the tiny Llama, written by hand."""
    sites = make_driver("llama").base_sites()
    make = tmp_path_factory.mktemp
    return [save_lora(make(f"rank-{rank}"), sites, rank, seed) for seed, rank in enumerate((1, 3, 4, 8, 9))]


def _jobs(adapters: list[Path], count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": [rng.randrange(3, 128) for _ in range(rng.randrange(1, 40))],
            "adapter": rng.choice([None, *adapters]),
            "max_tokens": rng.randrange(1, 24),
            "temperature": rng.choice([0.0, 0.0, 0.8]),
            "top_p": rng.choice([1.0, 0.9]),
            "seed": rng.randrange(1 << 40),
        }
        for _ in range(count)
    ]


def _submit(driver: Any, job: dict[str, Any]) -> str:
    uses = () if job["adapter"] is None else (driver.use(job["adapter"]),)
    options = {key: job[key] for key in ("max_tokens", "temperature", "top_p", "seed")}
    return driver.submit(job["prompt"], *uses, **options)


def _long_one(seed: int) -> dict[str, Any]:
    """It needs no adapter, so that several of them run at once however long loads take, and fills four pages."""
    prompt = [3 + seed, *range(10, 20)]
    return {"prompt": prompt, "adapter": None, "max_tokens": 50, "temperature": 0.8, "top_p": 1.0, "seed": seed}


TIGHT = [
    pytest.param({"max_batch_tokens": 7, "max_num_seqs": 3}, id="few tokens"),
    pytest.param({"kv_memory": 0.00006, "max_num_seqs": 8}, id="few pages"),
    pytest.param({"adapter_memory": 0.00012, "max_num_seqs": 4}, id="few adapters"),
    pytest.param({"kv_memory": 0.00005, "adapter_memory": 0.00012, "page_size": 4}, id="little of all"),
]


@pytest.mark.parametrize("options", TIGHT)
def test_any_schedule_gives_what_each_request_gives_alone(
    options: dict[str, Any], adapters: list[Path], make_driver: Callable[..., Any]
) -> None:
    alone, crowded = make_driver("llama", max_model_len=64), make_driver("llama", max_model_len=64, **options)
    jobs = _jobs(adapters, 24, seed=len(options)) + [_long_one(seed) for seed in range(8)]
    expected = []
    for job in jobs:
        request_id = _submit(alone, job)
        alone.run()
        expected.append(alone.outputs[request_id])
    rng = random.Random(1)
    ids = []
    for job in jobs:  # they arrive while others run
        ids.append(_submit(crowded, job))
        for _ in range(rng.randrange(3)):
            crowded.step()
    crowded.run()
    assert [crowded.outputs[request_id] for request_id in ids] == expected
    assert crowded.engine.scheduler.pages.num_free == crowded.engine.info.num_pages
    assert crowded.engine.adapters.num_references == 0
    if "kv_memory" in options:
        assert crowded.engine.stats().preemptions > 0
    if "adapter_memory" in options:
        assert crowded.engine.stats().adapter_evictions > 0


def test_abort_at_any_point_frees_everything(adapters: list[Path], make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=64, max_batch_tokens=16, max_num_seqs=4)
    rng = random.Random(5)
    ids = [_submit(driver, job) for job in _jobs(adapters, 16, seed=2)]
    for request_id in rng.sample(ids, len(ids)):
        driver.step()
        driver.engine.abort(request_id)
        driver.engine.check()
    driver.engine.abort("never heard of")
    assert not driver.engine.has_work
    assert driver.engine.scheduler.pages.num_free == driver.engine.info.num_pages
    assert driver.engine.adapters.num_references == 0


def test_unload_waits_for_the_running_request(adapters: list[Path], make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama")
    use = driver.use(adapters[3])
    expected = driver.generate([4, 5, 6], use, max_tokens=10)
    request_id = driver.submit([4, 5, 6], use, max_tokens=10)
    driver.step()
    assert driver.engine.adapters.unload(use.digest)
    assert driver.engine.adapters.resident()
    driver.run()
    assert driver.outputs[request_id] == expected
    assert not driver.engine.adapters.resident()
    assert driver.engine.adapters.arena.used == 0
    assert driver.generate([4, 5, 6], use, max_tokens=10) == expected, "it comes back when it is asked for"


def test_a_missing_blob_fails_the_request_and_nobody_else(
    adapters: list[Path], make_driver: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_driver("llama")
    lost = driver.submit([1, 2], driver.use(tmp_path / "gone"))
    kept = driver.submit([1, 2], driver.use(adapters[0]), max_tokens=3)
    driver.run()
    assert driver.failures[lost].kind == "StorageFailed"
    assert len(driver.outputs[kept]) == 3


def test_stop_tokens_eos_and_lengths(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=20)
    text = driver.generate([9, 9, 9], max_tokens=12)
    assert len(text) == 12
    stopped = driver.generate([9, 9, 9], max_tokens=12, stop_token_ids=(text[4],))
    assert stopped == text[: text.index(text[4]) + 1]
    assert len(driver.generate(list(range(3, 18)), max_tokens=500)) == 5, "the context ends the sequence"


@pytest.mark.parametrize(
    ("prompt", "reason"), [([], "no tokens"), ([128], "0 to 127"), ([-1], "0 to 127"), ([5] * 256, "256 tokens")]
)
def test_requests_that_cannot_run_are_refused(prompt: list[int], reason: str, make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama")
    request_id = driver.submit(prompt)
    assert reason in driver.failures[request_id].message
    assert not driver.engine.has_work


def _room_for_one(adapters: list[Path], make_driver: Callable[..., Any]) -> Any:
    """The two largest adapters are 64 and 72 KiB: a budget of 80 KiB holds either."""
    return make_driver("llama", adapter_memory=80 / (1 << 20), max_num_seqs=4)


def test_a_stream_of_younger_requests_does_not_starve_an_adapter(
    adapters: list[Path], make_driver: Callable[..., Any]
) -> None:
    driver = _room_for_one(adapters, make_driver)
    busy, waiting = driver.use(adapters[4]), driver.use(adapters[3])
    driver.generate([1], busy, max_tokens=1)
    for _ in range(3):
        driver.submit([1], busy, max_tokens=6)
    driver.step()
    old = driver.submit([1, 2], waiting, max_tokens=2)
    for _ in range(400):
        if len(driver.engine.scheduler.running) + len(driver.engine.scheduler.waiting) < 6:
            driver.submit([1], busy, max_tokens=6)  # traffic never pauses
        driver.step()
        if len(driver.outputs.get(old, [])) == 2:
            break
        time.sleep(0.001)
    assert len(driver.outputs.get(old, [])) == 2
    driver.run()


def test_an_upload_is_answered_while_the_device_is_full(adapters: list[Path], make_driver: Callable[..., Any]) -> None:
    driver = _room_for_one(adapters, make_driver)
    driver.submit([1], driver.use(adapters[4]), max_tokens=200)
    while not driver.engine.scheduler.running:
        driver.step()
    assert driver.engine.load(LoadAdapter("c", driver.use(adapters[3]))) == []
    for _ in range(100):
        driver.step()
        if "c" in driver.failures:
            break
        time.sleep(0.005)
    assert isinstance(driver.failures["c"], AdapterReady)
    assert driver.failures["c"].rank == 8
    driver.run()


def test_a_copy_that_fails_is_not_served(
    adapters: list[Path], make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver("llama")

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(driver.engine.adapters.transit.loader, "_copy", broken)
    lost = driver.submit([1, 2], driver.use(adapters[0]))
    driver.run()
    assert "the device is gone" in driver.failures[lost].message
    assert driver.engine.adapters.arena.used == 0


def test_aborted_requests_leave_nothing_in_host_memory(adapters: list[Path], make_driver: Callable[..., Any]) -> None:
    driver = _room_for_one(adapters, make_driver)
    driver.submit([1], driver.use(adapters[4]), max_tokens=100)
    while not driver.engine.scheduler.running:
        driver.step()
    lost = [driver.submit([1], driver.use(folder)) for folder in adapters[:4]]
    for _ in range(20):
        driver.step()
        time.sleep(0.002)
    for request_id in lost:
        driver.engine.abort(request_id)
    before = driver.engine.stats().adapter_evictions
    driver.run()
    driver.engine.step()
    assert len(driver.engine.adapters.resident()) <= 2
    assert not driver.engine.adapters.busy
    assert driver.engine.stats().adapter_evictions == before, "nobody is evicted for those who left"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: TRITON_INTERPRET=1")
def test_the_engine_over_triton_bodies_says_the_same(
    adapters: list[Path], make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA path but for the device: both Triton bodies, their warm-up, prefill and decode, mixed adapters."""
    plain = make_driver("llama")
    monkeypatch.setattr(tier, "select_kernels", partial(select_kernels, choice="triton"))
    monkeypatch.setattr(loader, "select_attention", partial(select_attention, choice="triton"))
    interpreted = make_driver("llama")
    monkeypatch.undo()
    jobs = _jobs(adapters, 6, seed=9)
    said = []
    for driver in (plain, interpreted):
        ids = [_submit(driver, job | {"max_tokens": 3}) for job in jobs]
        driver.run()
        said.append([driver.outputs[request_id] for request_id in ids])
    assert said[0] == said[1]


def test_loading_adapters_does_not_make_teams_of_workers(adapters: list[Path], make_driver: Callable[..., Any]) -> None:
    """A loader thread with OpenMP workers of its own makes every parallel operation of the loop sleep and wake."""
    driver = make_driver("llama")
    before = torch.get_num_threads()
    threads = driver.engine.adapters.transit.loader._readers
    for folder in adapters:
        driver.generate([1, 2], driver.use(folder), max_tokens=1)
    assert {threads.submit(torch.get_num_threads).result() for _ in range(8)} == {1}
    assert torch.get_num_threads() == before
