"""--deterministic: rows of the base have the same bits alone and in a batch of every family and option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .case import all_cases, made


def test_base_rows_have_the_same_bits_beside_every_family(
    checkpoint: Callable[..., Path], make_driver: Callable[..., Any], families_cache: Path
) -> None:
    base = checkpoint("llama")
    cases = [case for case in all_cases() if "llama" in case.architectures]
    others = [made(case, "llama", base, families_cache, case.prompt) for case in cases]
    driver = make_driver("llama", deterministic=True, kv_memory=0.05, adapter_memory=0.2)
    prompts = [list(range(3, 60, 2)), list(range(90, 20, -3))]
    jobs = [(prompt, ()) for prompt in prompts]
    mixed = jobs + [(one.prompt, (driver.use(one.adapter),)) for one in others]
    alone = [driver.logprobs([job], 100)[0] for job in jobs]
    for chunk in (100, 7):
        beside = driver.logprobs(mixed, chunk)[: len(jobs)]
        for one, other in zip(alone, beside, strict=True):
            last = max(one)
            assert torch.equal(one[last], other[last])
