"""Every family loaded, used and unloaded again and again: bytes, pages and references return to where they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .case import Made, all_cases, made


def _family(one: Made) -> str:
    assert one.adapter is not None
    family: str = json.loads((one.adapter / "adapter_config.json").read_text())["peft_type"]
    return family


@pytest.mark.parametrize(
    ("rounds", "every_case"),
    [(2, True), pytest.param(1000, False, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_unload_and_reload(
    rounds: int,
    every_case: bool,
    checkpoint: Callable[..., Path],
    make_driver: Callable[..., Any],
    families_cache: Path,
) -> None:
    """Two rounds of every case, or a thousand of one case for each family."""
    base = checkpoint("llama")
    cases = [case for case in all_cases() if "llama" in case.architectures]
    all_made = [made(case, "llama", base, families_cache, case.prompt) for case in cases]
    if not every_case:
        all_made = list({_family(one): one for one in reversed(all_made)}.values())
    driver = make_driver("llama", kv_memory=0.05, adapter_memory=0.2, max_num_seqs=512, max_batch_tokens=16384)
    engine = driver.engine
    pages = engine.scheduler.pages
    first: list[list[int]] | None = None
    for _ in range(rounds):
        uses = [driver.use(one.adapter) for one in all_made]
        ids = [driver.submit(one.prompt, use, max_tokens=2) for one, use in zip(all_made, uses, strict=True)]
        driver.run()
        texts = [driver.outputs.pop(request_id) for request_id in ids]
        assert texts == (first := first or texts), "a reloaded adapter answers otherwise"
        assert len(engine.adapters.resident()) == len(uses)
        for use in uses:
            assert engine.adapters.unload(use.digest)
        assert engine.adapters.arena.used == len(engine.adapters.shared) == engine.adapters.num_references == 0
        assert not engine.scheduler.running
        assert not engine.scheduler.waiting
        engine.check()
    assert pages.num_free <= pages.num_pages
