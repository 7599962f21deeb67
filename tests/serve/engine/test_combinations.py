"""Several adapters on one request: exact sums of families at one site, and refusals in the request's own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.bottleneck import OutputBottleneck
from onebase.kernels.ops.dense import Dense
from onebase.kernels.ops.tokens import SoftPrompt
from onebase.kernels.ops.vector import ScaleIn, ScaleOut

from .programs import PROMPT, Programs

TOLERANCE = 1e-4
HIDDEN = 64


@pytest.fixture
def programs(make_driver: Callable[..., Any]) -> Programs:
    return Programs(make_driver("llama"))


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 0.15


@torch.inference_mode()
def test_families_at_one_site_add_up(programs: Programs, checkpoint: Callable[..., Path]) -> None:
    """LoRA, DoRA and dense, each with a scale: equal to one matrix and bias written into transformers' own model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    scales = {"lora": 0.7, "dora": -1.3, "dense": 0.4}
    ops: dict[str, dict[str, SiteOps]] = {name: {} for name in scales}
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        module = model.get_submodule(path)
        (out, width), bias = module.weight.shape, module.bias
        a, b, c, d = (_draw(generator, 3, size) for size in (width, out, width, out))
        gain, matrix = _draw(generator, out), _draw(generator, out, width)
        ops["lora"][path] = SiteOps(low_rank=LowRank(a, b, 2.0))
        before_bias = None if bias is None else -gain * bias
        ops["dora"][path] = SiteOps(LowRank(c, d, 0.5), add_out=before_bias, extra=(ScaleOut(gain),))
        ops["dense"][path] = SiteOps(extra=(Dense(matrix),))
        change = scales["lora"] * 2.0 * (b.T @ a) + scales["dense"] * matrix
        change += scales["dora"] * (gain[:, None] * module.weight + 0.5 * d.T @ c)
        module.weight = torch.nn.Parameter(module.weight + change)
    for name, sites in ops.items():
        programs.add(name, sites)
    expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), -1)
    together = tuple(programs.use(name, scale) for name, scale in scales.items())
    jobs = [(PROMPT, together), (PROMPT, ()), (PROMPT, (programs.use("dora"),)), (PROMPT, together[::-1])]
    for chunk in (100, 2):
        got, base, _, turned = programs.driver.logprobs(jobs, chunk)
        for position, row in got.items():
            torch.testing.assert_close(row, expected[position], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(turned[position], expected[position], atol=TOLERANCE, rtol=0)
        assert max(float((got[at] - base[at]).abs().max()) for at in got) > 100 * TOLERANCE


def test_a_scale_of_zero_is_the_base_and_loads_nothing(programs: Programs) -> None:
    driver = programs.driver
    programs.add(
        "soft", {"model.embed_tokens": SiteOps(extra=(SoftPrompt(torch.randn(3, HIDDEN)),))}, num_virtual_tokens=3
    )
    programs.add("gain", {"lm_head": SiteOps(extra=(ScaleOut(torch.ones(128)),))})
    base = driver.generate(PROMPT, max_tokens=6)
    idle = [programs.use("soft", 0.0), programs.use("never heard of", 0.0)]
    assert driver.generate(PROMPT, *idle, max_tokens=6) == base
    assert programs.compiled == []
    alone = driver.generate(PROMPT, programs.use("gain", 0.5), max_tokens=6)
    assert driver.generate(PROMPT, *idle, programs.use("gain", 0.5), max_tokens=6) == alone
    assert programs.compiled == ["gain"]
    assert driver.engine.adapters.num_references == 0


def test_scales_that_mean_nothing_are_refused_by_name(programs: Programs) -> None:
    down, up = torch.randn(2, HIDDEN) * 0.1, torch.randn(HIDDEN, 2) * 0.1
    site = "model.layers.0.self_attn.q_proj"
    programs.add("bent", {site: SiteOps(extra=(OutputBottleneck(down, up, torch.ones(1), activation="tanh"),))})
    failure = programs.refusal(programs.use("bent", 0.5))
    for word in ("bent-as-asked", "0.5", site):
        assert word in failure.message
    assert len(programs.driver.generate(PROMPT, programs.use("bent"), max_tokens=2)) == 2


def test_pairs_that_do_not_go_together_are_refused_by_name(programs: Programs) -> None:
    embed, site = "model.embed_tokens", "model.layers.0.self_attn.q_proj"
    for name in ("soft", "prompt"):
        ops = {embed: SiteOps(extra=(SoftPrompt(torch.randn(3, HIDDEN)),))}
        programs.add(name, ops, num_virtual_tokens=3, first_position=3)
    for name, tokens in (("one", (5,)), ("other", (99,))):
        low_rank = LowRank(torch.randn(1, HIDDEN), torch.randn(1, HIDDEN), 1.0)
        programs.add(name, {site: SiteOps(low_rank=low_rank)}, invocation=tokens)
    programs.add("in", {site: SiteOps(extra=(ScaleIn(torch.ones(HIDDEN)),))})
    programs.add("out", {site: SiteOps(extra=(ScaleOut(torch.ones(HIDDEN)),))})
    for bystander, *pair, word in (
        ("out", "soft", "prompt", "virtual"),
        ("soft", "one", "other", "activated"),
        ("soft", "in", "out", site),
    ):
        failure = programs.refusal(programs.use(bystander), *map(programs.use, pair))
        assert word in failure.message
        assert all(f"'{name}-as-asked'" in failure.message for name in pair)
        assert f"'{bystander}-as-asked'" not in failure.message
    assert len(programs.driver.generate(PROMPT, programs.use("soft"), programs.use("in"), max_tokens=2)) == 2


def test_a_refusal_leaves_nothing_behind_and_holds_nobody_back(programs: Programs) -> None:
    driver = programs.driver
    programs.add("gain", {"lm_head": SiteOps(extra=(ScaleOut(torch.ones(128)),))})
    bent = OutputBottleneck(torch.randn(2, 128), torch.randn(128, 2), torch.ones(1), activation="tanh")
    programs.add("bent", {"lm_head": SiteOps(extra=(bent,))})
    expected = driver.generate(PROMPT, programs.use("gain"), max_tokens=4)
    refused = [driver.submit(PROMPT, programs.use("gain"), programs.use("bent", 2.0)) for _ in range(3)]
    fine = driver.submit(PROMPT, programs.use("gain"), max_tokens=4)
    driver.run()
    assert set(refused) <= driver.failures.keys()
    assert driver.outputs[fine] == expected
    assert driver.engine.adapters.num_references == 0
    assert driver.engine.scheduler.pages.num_free == driver.engine.info.num_pages
