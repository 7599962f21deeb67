"""ReFT in the engine: prompts of several lengths in cached pages, generated tokens, other adapters on the request."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onebase.adapters.base import SiteKind
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.loader import load_model

from ..conftest import ARCHITECTURES
from .hub_files import LORA, PREFIX, REFT, HubCase
from .hub_oracle import hub_applied
from .recomputed import load, prompt_of

ENDS = REFT | {"suffix_positions": 6}
NOREFT = REFT | {"orthogonality": False, "suffix_positions": 2, "r": 2}
NUM_TOKENS = 5


@torch.inference_mode()
def _logprobs(base: Path, tokens: list[int], folders: list[Path], length: int) -> Tensor:
    """[len(tokens), vocabulary] under several adapters at once, whose prompt are the first ``length`` tokens."""
    model = load(base)
    arguments: dict[str, Any] = {}
    with ExitStack() as stack:
        for folder in folders:
            arguments |= stack.enter_context(hub_applied(folder, model, length))
        if arguments:
            arguments["position_ids"] = torch.arange(len(tokens))[None]
        return torch.log_softmax(model(input_ids=torch.tensor([tokens]), **arguments).logits[0].float(), -1)


def _greedy(base: Path, prompt: list[int], *folders: Path) -> list[int]:
    """By full forwards, in which the adapters know the prompt."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(_logprobs(base, tokens, list(folders), len(prompt))[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture
def written(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """written(architecture, name, configuration) -> an adapter's folder."""

    def write(architecture: str, name: str, part: dict[str, Any]) -> Path:
        folder = tmp_path / name
        HubCase(name, (part,)).write(load(checkpoint(architecture)), folder)
        return folder

    return write


@pytest.mark.parametrize("deterministic", [False, True])
def test_prompts_of_several_lengths_share_the_pages_that_they_can(
    deterministic: bool, make_driver: Callable[..., Any], checkpoint: Callable[..., Path], written: Callable[..., Path]
) -> None:
    """The second page of the prompt of 21 tokens has rows of its end (15 to 20), those of longer prompts have not."""
    driver, base = make_driver("llama", max_batch_tokens=16, deterministic=deterministic), checkpoint("llama")
    folders = [written("llama", "ends", ENDS), written("llama", "noreft", NOREFT)]
    uses = [driver.use(folder) for folder in folders]
    prompt = prompt_of("ends")
    prompts = [prompt, [*prompt, *prompt[:5]], prompt, prompt[:17], [*prompt, *prompt[:7]]]
    expected = [[_greedy(base, one, folder) for one in prompts] for folder in folders]
    alone = [[driver.generate(one, use, max_tokens=NUM_TOKENS) for one in prompts] for use in uses]
    assert alone == expected
    assert driver.engine.stats().cached_tokens >= 2 * (8 + 16)
    ids = [[driver.submit(one, use, max_tokens=NUM_TOKENS) for one in prompts] for use in uses]
    plain = driver.submit(prompt, max_tokens=NUM_TOKENS)
    driver.run()
    assert [[driver.outputs[one] for one in each] for each in ids] == expected
    assert driver.outputs[plain] == _greedy(base, prompt)


def test_beside_other_adapters_on_the_request(
    make_driver: Callable[..., Any], checkpoint: Callable[..., Path], written: Callable[..., Path]
) -> None:
    driver, base, prompt = make_driver("llama_mha"), checkpoint("llama_mha"), prompt_of("combined")
    reft, lora = written("llama_mha", "ends", ENDS), written("llama_mha", "lora", LORA)
    prefix = written("llama_mha", "prefix", PREFIX)
    jobs = [(reft, lora), (prefix, reft), (reft, lora, prefix)]
    for chunk in (100, 4):
        rows = driver.logprobs([(prompt, tuple(map(driver.use, folders))) for folders in jobs], chunk)
        for folders, found in zip(jobs, rows, strict=True):
            expected = _logprobs(base, prompt, list(folders), len(prompt))
            for position, got in found.items():
                torch.testing.assert_close(got, expected[position], atol=1e-4, rtol=0)


def test_a_prompt_shorter_than_the_end_is_refused(
    make_driver: Callable[..., Any], written: Callable[..., Path]
) -> None:
    """The library mixes its rows up there. One without a beginning or an end to mix is served."""
    driver, folder = make_driver("llama"), written("llama", "ends", ENDS)
    short = driver.submit([5, 6, 7, 8, 9], driver.use(folder))
    whole = driver.submit([5, 6, 7, 8, 9, 10], driver.use(folder))
    last = driver.submit([5], driver.use(written("llama", "last", ENDS | {"prefix_positions": 0})))
    driver.run()
    assert "has 5 tokens" in driver.failures[short].message
    assert "acts on its last 6" in driver.failures[short].message
    assert driver.outputs.keys() == {whole, last}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_base_has_its_layers(architecture: str, checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(checkpoint(architecture)), dtype="float32", device="cpu", page_size=8)
    base = load_model(config)
    paths = [layer.path for layer in base.layers]
    assert len(set(paths)) == 2
    assert all(path is not None and base.sites[path].kind is SiteKind.LAYER for path in paths)
