"""The engine under pressure: whatever the schedule, a request says what it says alone, and everything is given back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def adapters(make_driver: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five LoRA folders of ranks 1 to 9 on the tiny Llama, written by hand."""
    sites = make_driver("llama").base_sites()
    folders = []
    for seed, rank in enumerate((1, 3, 4, 8, 9)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for site in sites:
            prefix = f"base_model.model.{site.path}.lora"
            tensors[f"{prefix}_A.weight"] = torch.randn(rank, site.in_features, generator=generator) * 0.2
            tensors[f"{prefix}_B.weight"] = torch.randn(site.out_features, rank, generator=generator) * 0.2
        folders.append(tmp_path_factory.mktemp(f"rank-{rank}"))
        save_file(tensors, folders[-1] / "adapter_model.safetensors")
        config = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}}}'
        (folders[-1] / "adapter_config.json").write_text(config)
    return folders


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


TIGHT = [
    pytest.param({"max_batch_tokens": 7, "max_num_seqs": 3}, id="few tokens"),
    pytest.param({"kv_memory": 0.00012, "max_num_seqs": 8}, id="few pages"),
    pytest.param({"adapter_memory": 0.00012, "max_num_seqs": 4}, id="few adapters"),
    pytest.param({"kv_memory": 0.00005, "adapter_memory": 0.00012, "page_size": 4}, id="little of all"),
]


@pytest.mark.parametrize("options", TIGHT)
def test_any_schedule_gives_what_each_request_gives_alone(
    options: dict[str, Any], adapters: list[Path], make_driver: Callable[..., Any]
) -> None:
    alone, crowded = make_driver("llama", max_model_len=64), make_driver("llama", max_model_len=64, **options)
    jobs = _jobs(adapters, 24, seed=len(options))
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
    crowded.run(steps=200_000)
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
    assert driver.failures[lost].kind == "AdapterRejected"
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
