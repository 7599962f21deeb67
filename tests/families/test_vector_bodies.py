"""Families of scales and rotations equal HF PEFT through the Triton and the reference body too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.kernels.dispatch import select_kernels
from onebase.kernels.plan import BatchPlan
from onebase.serve.engine import tier

from .case import all_cases, made

TOLERANCE = 1e-4
WHOLE = ("ia3", "dora", "road-1", "road-2", "road-4")  # nothing of them is left to instructions
CASES = {case.name: case for case in all_cases()}


@pytest.fixture(scope="module")
def driver_through(make_driver: Callable[..., Any]) -> Callable[[str], Any]:
    """One engine over each body."""

    @functools.cache
    def make(body: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tier, "select_kernels", partial(select_kernels, choice=body))
            return make_driver("llama", kv_memory=0.02)

    return make


@pytest.mark.parametrize("body", ["triton", "reference"])
@pytest.mark.parametrize("name", ["ia3", "dora", "road-4", "boft-bias", "glora-vector-vector-constant"])
def test_vectors_equal_peft(
    name: str,
    body: str,
    checkpoint: Callable[..., Path],
    driver_through: Callable[[str], Any],
    families_cache: Path,
) -> None:
    """Beside base rows and another adapter, in chunks."""
    base, case = checkpoint("llama"), CASES[name]
    driver = driver_through(body)
    it, plain = (made(one, "llama", base, families_cache, case.prompt) for one in (case, None))
    other = made(CASES["dora"], "llama", base, families_cache, CASES["dora"].prompt)
    uses = [driver.use(one.adapter) for one in (it, other)]
    jobs = [(plain.tokens, ()), (it.tokens, (uses[0],)), (other.tokens, (uses[1],))]
    for one, rows in zip((plain, it, other), driver.logprobs(jobs, 6), strict=True):
        for position, got in rows.items():
            torch.testing.assert_close(got, one.logprobs[position], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_is_left_to_instructions(
    name: str, checkpoint: Callable[..., Path], driver_through: Callable[[str], Any], families_cache: Path
) -> None:
    """So that their decode steps can be captured."""
    driver, case = driver_through("reference"), CASES[name]
    adapter = driver.use(made(case, "llama", checkpoint("llama"), families_cache, case.prompt).adapter)
    driver.generate([5, 7], adapter, max_tokens=1)
    handle = driver.engine.adapters.fetch(adapter.digest, adapter.path).handle
    plan = BatchPlan.from_rows([((handle, 1.0),)])
    assert not driver.engine.runner._instructions.touched(plan)
