"""Every family and option equals HF PEFT: in a batch with the base and another adapter, in one go and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .case import Case, all_cases, made

TOLERANCE = 1e-4
CASES = [(case, architecture) for case in all_cases() for architecture in case.architectures]
COMPANION = next(case for case in all_cases() if case.name == "lora")


@pytest.mark.parametrize(("case", "architecture"), CASES, ids=[f"{case.name}-{name}" for case, name in CASES])
def test_family_equals_peft(
    case: Case,
    architecture: str,
    checkpoint: Callable[..., Path],
    driver_of: Callable[[str], Any],
    families_cache: Path,
) -> None:
    base, driver = checkpoint(architecture), driver_of(architecture)
    it, other, plain = (made(one, architecture, base, families_cache, case.prompt) for one in (case, COMPANION, None))
    uses = [driver.use(one.adapter) for one in (it, other)]
    jobs = [(plain.tokens, ()), (it.tokens, (uses[0],)), (other.tokens, (uses[1],)), (it.tokens, ())]
    for chunk in (100, 5):
        found = driver.logprobs(jobs, chunk)
        for one, rows in zip((plain, it, other), found, strict=False):
            for position, got in rows.items():
                torch.testing.assert_close(got, one.logprobs[position], atol=TOLERANCE, rtol=0)
        moved = max(float((found[1][at] - found[3][at]).abs().max()) for at in found[1].keys() & found[3].keys())
        assert moved > 100 * TOLERANCE, "an adapter served as the base would pass"
    for use in {use.digest for use in uses}:
        assert driver.engine.adapters.unload(use)
    assert driver.engine.adapters.arena.used == 0
