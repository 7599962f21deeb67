"""Engines whose pages and adapters take room from each other: nobody starves, and nothing that is said changes.

tests/serve/engine/test_random_schedules.py has the same over every kind of adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebase.adapters.program import LowRank, SiteOps
from onebase.serve.engine import assembly
from onebase.serve.engine.config import GIB
from onebase.serve.engine.messages import SetPins
from onebase.serve.engine.usage import Usage

from .programs import Programs

SLOT = 4096  # a page of 8 tokens of both layers of the tiny Llama
Make = Callable[..., Any]


@pytest.fixture
def make_moving(make_driver: Make) -> Make:
    """An engine with so many slots for pages and for adapters at the start; they may have nearly all."""

    def make(slots: int, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assembly, "measure", lambda config, base: Usage(0, 4 * slots * SLOT, 0, 0))
            bounds = {"kv_memory": SLOT / GIB, "kv_memory_max": 1.0, "adapter_memory": SLOT / GIB}
            driver = make_driver("llama", **bounds, adapter_memory_max=1.0, **options)
        driver.engine.adapters.arena.buffer.fill_(float("nan"))  # of the whole buffer: pages too are not read unwritten
        return driver

    return make


def _adapters(driver: Any, *ranks: int) -> Programs:
    """Of half a slot a rank, by rank."""
    programs = Programs(driver)
    for rank in ranks:
        draw = torch.Generator().manual_seed(rank)
        paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qo"]
        factors = {path: torch.randn(2, rank, 64, generator=draw) * 0.2 for path in paths}
        programs.add(str(rank), {path: SiteOps(LowRank(*pair, 1.0)) for path, pair in factors.items()})
    return programs


def test_a_stream_of_base_requests_does_not_starve_a_large_adapter(make_moving: Make) -> None:
    """It is larger than the arena is; pages are short all the time, and none of their requests needs an adapter."""
    driver = make_moving(12, max_model_len=40, max_num_seqs=16)
    use, old = _adapters(driver, 32).use("32"), ""
    for step in range(600):
        if len(driver.engine.scheduler.running) + len(driver.engine.scheduler.waiting) < 12:
            driver.submit(list(range(20, 40)), max_tokens=18)
        if step == 30:
            assert driver.engine.stats().adapter_bytes == SLOT, "sequences have taken all but its lower bound"
            old = driver.submit([1, 2], use, max_tokens=2)
        driver.step()
        if len(driver.outputs.get(old, [])) == 2:
            break
        time.sleep(0.0005)
    assert len(driver.outputs.get(old, [])) == 2
    assert driver.engine.stats().adapter_bytes >= 16 * SLOT
    driver.run()


def test_a_long_sequence_gets_the_room_of_adapters_that_nobody_uses(make_moving: Make) -> None:
    driver = make_moving(12, max_model_len=88, max_num_seqs=4)
    programs = _adapters(driver, 6, 8)
    alone = driver.generate(list(range(20, 90)), max_tokens=18)
    for name in ("6", "8"):
        driver.generate([1, 2], programs.use(name))
    assert len(driver.engine.adapters.resident()) == 2
    first, second = (driver.submit(list(range(20, 90)), max_tokens=18, prompt_logprobs=0) for _ in range(2))
    driver.run()
    assert driver.outputs[first] == driver.outputs[second] == alone
    assert driver.engine.stats().preemptions == 0
    assert driver.engine.stats().num_pages >= 22
    assert driver.engine.stats().adapter_evictions >= 1


def test_pins_get_the_room_of_pages_while_nothing_runs(make_moving: Make) -> None:
    """As the loop has it: it steps on while the tiers say that they are busy, also where pages were short before."""
    driver = make_moving(12, max_model_len=40, max_num_seqs=4)
    programs = _adapters(driver, 8, 9, 10)  # 13.5 slots together, of 12 now and 19 at most
    for _ in range(6):
        driver.submit(list(range(20, 40)), max_tokens=18)
    driver.run()
    driver.engine.set_pins(SetPins(tuple(programs.use(name) for name in ("8", "9", "10"))))
    driver.step()
    for _ in range(2000):
        if not driver.engine.adapters.busy:
            break
        driver.step()
        time.sleep(0.0005)
    assert driver.engine.stats().pinned == ("8", "9", "10")


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_said_does_not_depend_on_the_split(deterministic: bool, make_driver: Make, make_moving: Make) -> None:
    """Bits, in the deterministic mode, whose rows of no importance have pages beyond the budget's."""
    options = {"max_model_len": 72, "max_num_seqs": 4, "deterministic": deterministic}
    moving, fixed = make_moving(14, **options), make_driver("llama", **options)
    said = []
    for driver in (moving, fixed):
        programs, requests = _adapters(driver, 3, 5, 16, 24), list[str]()
        for turn in range(3):
            for name in ("", "3", "24", "", "5", "16"):
                uses = (programs.use(name),) if name else ()
                prompt = list(range(20 + turn, 60 if not name else 30))
                requests.append(driver.submit(prompt, *uses, max_tokens=12, temperature=0.8, seed=turn))
        driver.run()
        said.append([driver.outputs[request] for request in requests])
    assert said[0] == said[1]
    assert moving.engine.stats().budget_moves > 1
    assert fixed.engine.stats().budget_moves == 0


def test_the_engine_says_how_its_memory_is_split(make_moving: Make) -> None:
    driver = make_moving(12, max_model_len=40, max_num_seqs=4)
    info, stats = driver.engine.info, driver.engine.stats()
    assert (info.num_pages, info.page_bounds) == (12, (5, 20))
    assert (info.adapter_bytes, info.adapter_byte_bounds) == (12 * SLOT, (SLOT, 19 * SLOT))
    rows = {row.what: row for row in info.memory}
    assert (rows["kv_pages"].nbytes, rows["kv_pages"].note) == (12 * SLOT, "12 pages (5 to 20)")
    assert rows["adapters"].nbytes == 12 * SLOT
    assert (stats.num_pages, stats.free_pages, stats.adapter_bytes) == (12, 12, 12 * SLOT)
    driver.generate([1], _adapters(driver, 30).use("30"))
    stats = driver.engine.stats()
    assert stats.budget_moves == 1
    assert stats.num_pages * SLOT + stats.adapter_bytes == 24 * SLOT
    assert stats.free_pages == stats.num_pages < 12
