"""Routed experts: several adapters with scales on one row, rows that share experts, and modules that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from onebase.adapters.base import SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.loader import load_model

from .case import Case
from .cases_experts import CASES, MOE, ROUTER

PROMPT = torch.randint(3, 128, (21,), generator=torch.Generator().manual_seed(4)).tolist()
STACKED, PATTERNS = (case for case in CASES if case.architectures == MOE)
ROUTED = Case(
    "lora-routed",
    lambda name: peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", ROUTER[name]]),
)


@torch.inference_mode()
def _merged_logprobs(base: Path, uses: list[tuple[Path, float]]) -> torch.Tensor:
    """The base with scale times each adapter's change in its weights, as PEFT merges it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for folder, scale in uses:
        fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = peft.PeftModel.from_pretrained(fresh, folder).merge_and_unload()
        for name, parameter in merged.named_parameters():
            model.get_parameter(name).data += scale * (parameter - plain[name])
    return torch.log_softmax(model.eval()(input_ids=torch.tensor([PROMPT])).logits[0].float(), -1)


@pytest.mark.parametrize("architecture", MOE)
def test_adapters_and_scales_on_one_row_add_up(
    architecture: str, checkpoint: Callable[..., Path], make_driver: Callable[..., Any], tmp_path: Path
) -> None:
    base, driver = checkpoint(architecture), make_driver(architecture)
    folders = [tmp_path / case.name for case in (STACKED, PATTERNS, ROUTED)]
    for case, folder in zip((STACKED, PATTERNS, ROUTED), folders, strict=True):
        case.save(base, architecture, folder)
    stacks = [
        [],
        [(folders[0], 0.5)],
        [(folders[0], 1.0), (folders[2], -0.75)],
        [(folders[1], 0.25), (folders[2], 1.0), (folders[0], 0.5)],
        [(folders[2], 1.0)],
    ]
    expected = [_merged_logprobs(base, stack) for stack in stacks]
    for chunk in (100, 4, 1):
        jobs = [(PROMPT, tuple(driver.use(folder, scale) for folder, scale in stack)) for stack in stacks]
        for found, reference in zip(driver.logprobs(jobs, chunk), expected, strict=True):
            for position, got in found.items():
                torch.testing.assert_close(got, reference[position], atol=1e-4, rtol=0)
    assert all(float((one - expected[0]).abs().max()) > 0.01 for one in expected[1:])


@pytest.mark.parametrize("architecture", MOE)
def test_the_probe_finds_experts_and_routers(architecture: str, checkpoint: Callable[..., Path]) -> None:
    base = load_model(EngineConfig(model=str(checkpoint(architecture)), device="cpu"))
    kinds = [site.kind for site in base.sites.values()]
    assert kinds.count(SiteKind.EXPERTS) == kinds.count(SiteKind.ROUTER) == 2
    shape = base.experts["model.layers.1.mlp.experts"]
    model = base.model.config
    assert (shape.per_token, shape.up.in_features, shape.down.out_features) == (model.num_experts_per_tok, 64, 64)


def test_experts_with_arithmetic_of_their_own_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another activation than the one the module says it has: only its output on random rows tells."""
    from transformers.models.mixtral import modeling_mixtral

    right = modeling_mixtral.MixtralExperts.forward
    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", lambda *args: right(*args) * 1.01)
    base = load_model(EngineConfig(model=str(checkpoint("mixtral")), device="cpu"))
    assert base.experts == {}
    assert "something of their own" in base.refused["model.layers.0.mlp.experts"]
    STACKED.save(checkpoint("mixtral"), "mixtral", tmp_path)
    with pytest.raises(AdapterRejected, match="cannot be adapted: its experts compute something of their own"):
        compile_folder(tmp_path, base, "d")
