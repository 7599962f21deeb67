"""VeRA's projections are on the device once, however many adapters read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .case import Made, all_cases, made

NUM_ADAPTERS = 100
FILE = "adapter_model.safetensors"


@pytest.fixture
def adapter_of(checkpoint: Callable[..., Path], families_cache: Path) -> Callable[[str], Made]:
    def get(name: str) -> Made:
        case = next(case for case in all_cases() if case.name == name)
        return made(case, "llama", checkpoint("llama"), families_cache, case.prompt)

    return get


@pytest.fixture
def vera(adapter_of: Callable[[str], Made]) -> Made:
    return adapter_of("vera")


def _siblings(vera: Made, root: Path) -> list[Path]:
    """Adapters with other vectors over the same projections."""
    assert vera.adapter is not None
    tensors, generator = load_file(vera.adapter / FILE), torch.Generator().manual_seed(0)
    folders = []
    for number in range(NUM_ADAPTERS):
        folders.append(root / str(number))
        folders[-1].mkdir(parents=True)
        (folders[-1] / "adapter_config.json").write_bytes((vera.adapter / "adapter_config.json").read_bytes())
        drawn = {
            key: torch.randn(tensor.shape, generator=generator) if "lambda" in key else tensor
            for key, tensor in tensors.items()
        }
        save_file(drawn, folders[-1] / FILE, metadata={"format": "pt"})
    return folders


def test_a_hundred_adapters_hold_their_vectors_and_one_pair_of_projections(
    vera: Made, make_driver: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_driver("llama")
    cache = driver.engine.adapters
    first = driver.use(vera.adapter)
    alone = driver.logprobs([(vera.tokens, (first,))], 100)[0]
    used = cache.arena.used_bytes
    own = cache.parts(first.digest).get(first.digest)
    assert own is not None
    assert used > 2 * own, "the projections should outweigh the vectors"
    uses = [driver.use(folder) for folder in _siblings(vera, tmp_path / "siblings")]
    prompts = [(vera.prompt, (use,)) for use in uses[::33]]
    driver.logprobs([(vera.prompt, (use,)) for use in uses], 100)
    assert cache.arena.used_bytes == used + NUM_ADAPTERS * own
    beside = driver.logprobs([(vera.tokens, (first,)), *prompts], 100)[0]
    for position, expected in alone.items():
        torch.testing.assert_close(beside[position], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(beside[position], vera.logprobs[position], atol=1e-4, rtol=0)
    for use in (first, *uses[1:]):  # the last one keeps the projections alive
        cache.unload(use.digest)
    assert cache.arena.used_bytes == used
    cache.unload(uses[0].digest)
    assert cache.arena.used_bytes == 0


def test_adapters_whose_projections_do_not_fit_together(
    vera: Made, adapter_of: Callable[[str], Made], make_driver: Callable[..., Any]
) -> None:
    """One after the other they are served; on one request they are refused, as nothing could ever make room."""
    other = adapter_of("vera-seed")  # of another seed
    ample = make_driver("llama")
    ample.generate(vera.prompt, ample.use(vera.adapter))
    used = ample.engine.adapters.arena.used_bytes
    driver = make_driver("llama", adapter_memory=1.6 * used / (1 << 30))
    uses = [driver.use(one.adapter) for one in (vera, other)]
    together = driver.submit(vera.prompt, *uses)
    driver.run()
    assert "together they take" in driver.failures[together].message
    requests = [driver.submit(vera.prompt, uses[turn % 2], max_tokens=3) for turn in range(4)]
    driver.run()
    assert [len(driver.outputs[request]) for request in requests] == [3, 3, 3, 3]
    assert driver.engine.adapters.device.evictions > 0
