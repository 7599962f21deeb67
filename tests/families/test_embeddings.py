"""Embeddings under adapters equal the hidden states of HF PEFT, in one batch with generation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from onebase.serve.engine.messages import Request, SamplingParams, TokenOutput

from .case import all_cases, made

TOLERANCE = 1e-4
FAMILIES = ("lora", "ia3", "prompt", "prefix")


def states(base: Path, adapter: Path, prompt: list[int]) -> Tensor:
    """PEFT's states after the last norm, of the prompt's own tokens: float32 [tokens, width]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        hidden = adapted(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
    return hidden[0, -len(prompt) :].float()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 16}], ids=["one go", "chunks"])
def test_embeddings_equal_peft_beside_generation(
    options: dict[str, Any],
    architecture: str,
    checkpoint: Callable[..., Path],
    make_driver: Callable[..., Any],
    families_cache: Path,
) -> None:
    base, driver = checkpoint(architecture), make_driver(architecture, **options)
    cases = [case for case in all_cases() if case.name in FAMILIES]
    assert len(cases) == len(FAMILIES)
    adapters = {case.name: made(case, architecture, base, families_cache, case.prompt) for case in cases}
    for one in adapters.values():
        driver.submit(one.prompt, driver.use(one.adapter), max_tokens=3)
        for kind in ("last", "mean"):
            uses = (driver.use(one.adapter),)
            request = Request(f"{one.adapter}-{kind}", tuple(one.prompt), SamplingParams(0), uses, embeds=kind)
            assert not driver.engine.add(request)
    found: dict[str, Tensor] = {}
    while driver.engine.has_work:
        for output in driver.engine.step():
            assert isinstance(output, TokenOutput), output
            if output.embedding is not None:
                found[output.id] = torch.from_numpy(np.frombuffer(output.embedding, np.float32).copy())
        driver.engine.check()
    for one in adapters.values():
        rows = states(base, one.adapter, one.prompt)
        torch.testing.assert_close(found[f"{one.adapter}-last"], rows[-1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found[f"{one.adapter}-mean"], rows.mean(0), atol=TOLERANCE, rtol=0)
