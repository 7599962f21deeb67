"""Every family and option equals HF PEFT: in a batch with the base and another adapter, in one go and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .case import Case, all_cases, peft_logprobs

TOLERANCE = 1e-4
CASES = [(case, architecture) for case in all_cases() for architecture in case.architectures]
COMPANION = next(case for case in all_cases() if case.name == "lora")


@pytest.fixture(scope="module")
def driver_of(make_driver: Callable[..., Any]) -> Callable[[str], Any]:
    """One engine for each architecture."""
    made: dict[str, Any] = {}

    def get(architecture: str) -> Any:
        if architecture not in made:
            made[architecture] = make_driver(architecture, kv_memory=0.02)
        return made[architecture]

    return get


def _prompt(case: Case) -> list[int]:
    if case.tokens is not None:
        return list(case.tokens)
    generator = torch.Generator().manual_seed(len(case.name))
    return torch.randint(3, 128, (21,), generator=generator).tolist()


@pytest.mark.parametrize(("case", "architecture"), CASES, ids=[f"{case.name}-{name}" for case, name in CASES])
def test_family_equals_peft(
    case: Case, architecture: str, checkpoint: Callable[..., Path], driver_of: Callable[[str], Any], tmp_path: Path
) -> None:
    base, driver, prompt = checkpoint(architecture), driver_of(architecture), _prompt(case)
    case.save(base, architecture, tmp_path / "it")
    COMPANION.save(base, architecture, tmp_path / "other", seed=1)
    plain, expected = (peft_logprobs(base, folder, prompt) for folder in (None, tmp_path / "it"))
    uses = [(), (driver.use(tmp_path / "it"),), (driver.use(tmp_path / "other"),)]
    for chunk in (100, 5):
        base_rows, rows, _ = driver.logprobs([(prompt, use) for use in uses], chunk)
        for position, got in rows.items():
            torch.testing.assert_close(got, expected[position], atol=TOLERANCE, rtol=0)
        for position, got in base_rows.items():
            torch.testing.assert_close(got, plain[position], atol=TOLERANCE, rtol=0)
        moved = max(float((rows[at] - base_rows[at]).abs().max()) for at in rows)
        assert moved > 100 * TOLERANCE, "an adapter served as the base would pass"
    for folder in ("it", "other"):
        assert driver.engine.adapters.unload(str(tmp_path / folder))
    assert driver.engine.adapters.arena.used == 0
