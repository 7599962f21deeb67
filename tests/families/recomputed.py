"""Adapters that no library here can load: served, and held to a recomputation on the plain model of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .case import TARGETS, made
from .cases_lora import CASES

TOLERANCE = 1e-4
LORA = next(case for case in CASES if case.name == "lora")
Draw = Callable[..., Tensor]
Applied = Callable[[nn.Module], AbstractContextManager[Mapping[str, Any]]]


def drawn(seed: int, scale: float = 0.3) -> Draw:
    """draw(*shape): a random float32 tensor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * scale


def prompt_of(name: str) -> list[int]:
    return torch.randint(3, 128, (21,), generator=torch.Generator().manual_seed(len(name))).tolist()


def load(base: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def recomputed(base: Path, prompt: list[int], applied: Applied) -> Tensor:
    """Log-probabilities [len(prompt), vocabulary] of the model while ``applied`` is entered, which gives the forward
    further arguments."""
    model = load(base)
    with applied(model) as arguments:
        logits = model(input_ids=torch.tensor([prompt]), **arguments).logits[0].float()
    return torch.log_softmax(logits, -1)


def check_served(driver: Any, base: Path, architecture: str, folder: Path, applied: Applied, cache: Path) -> None:
    """In one batch with the base and a LoRA, in one go and in chunks, the adapter equals its recomputation."""
    prompt = prompt_of(folder.name)
    expected = recomputed(base, prompt, applied)
    cache.mkdir(parents=True, exist_ok=True)
    companion = made(LORA, architecture if architecture in TARGETS else "llama", base, cache / architecture, prompt)
    use, other = driver.use(folder), driver.use(companion.adapter)
    jobs = [(prompt, (use,)), (companion.tokens, (other,)), (prompt, ())]
    for chunk in (100, 5):
        rows, companion_rows, plain = driver.logprobs(jobs, chunk)
        for position, got in rows.items():
            torch.testing.assert_close(got, expected[position], atol=TOLERANCE, rtol=0)
        for position, got in companion_rows.items():
            torch.testing.assert_close(got, companion.logprobs[position], atol=TOLERANCE, rtol=0)
        moved = max(float((rows[at] - plain[at]).abs().max()) for at in rows.keys() & plain.keys())
        assert moved > 100 * TOLERANCE, "an adapter served as the base would pass"
    assert driver.engine.adapters.unload(use.digest)
    assert driver.engine.adapters.unload(other.digest)
    assert driver.engine.adapters.arena.used == 0
