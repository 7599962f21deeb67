"""--deterministic: the same request has the same bits alone, among many, and in any chunks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.bottleneck import BlockBottleneck, OutputBottleneck
from onebase.kernels.ops.dense import Dense
from onebase.kernels.ops.norm import NormOverride
from onebase.kernels.ops.tokens import SoftPrompt
from onebase.kernels.ops.vector import ScaleIn, ScaleOut
from onebase.serve.engine.messages import AdapterUse

from .ear import Ear
from .programs import Programs

SITES = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
}
NORM = {"llama": "model.layers.1.input_layernorm", "gpt2": "transformer.h.1.ln_1"}
BLOCK = {"llama": "model.layers.0.mlp", "gpt2": "transformer.h.0.mlp"}
EMBED = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def _programs(driver: Any, architecture: str) -> Programs:
    """One adapter of each kind of instruction, an activated one and a soft prompt among them."""
    programs = Programs(driver)
    generator = torch.Generator().manual_seed(1)
    shapes = {site.path: (site.out_features, site.in_features) for site in driver.sites}
    first, second = SITES[architecture]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    def low_rank(path: str, rank: int) -> LowRank:
        return LowRank(draw(rank, shapes[path][1]), draw(rank, shapes[path][0]), 1.5)

    out = shapes[first][0]
    programs.add("lora", {path: SiteOps(low_rank=low_rank(path, 7)) for path in (first, second, "lm_head")})
    programs.add("dora", {first: SiteOps(low_rank(first, 3), add_out=draw(out), extra=(ScaleOut(draw(out)),))})
    programs.add("dense", {second: SiteOps(extra=(Dense(draw(*shapes[second])), ScaleIn(draw(shapes[second][1]))))})
    bent = OutputBottleneck(draw(5, out), draw(out, 5), torch.ones(1), activation="gelu")
    block = BlockBottleneck(draw(6, 64), draw(64, 6), torch.ones(1), activation="silu", reads="residual")
    norm = NormOverride(1 + draw(64), draw(64) if architecture == "gpt2" else None)
    bends = {first: (bent,), BLOCK[architecture]: (block,), NORM[architecture]: (norm,)}
    programs.add("bent", {path: SiteOps(extra=extra) for path, extra in bends.items()})
    programs.add("activated", {first: SiteOps(low_rank=low_rank(first, 4))}, invocation=(50, 51))
    soft = {EMBED[architecture]: SiteOps(extra=(SoftPrompt(draw(5, 64)),))}
    programs.add("soft", soft, num_virtual_tokens=5, first_position=5)
    return programs


def _jobs(programs: Programs, count: int = 14) -> list[tuple[list[int], tuple[AdapterUse, ...], dict[str, Any]]]:
    rng = random.Random(4)
    choices = [(), *((name,) for name in programs.made), ("lora", "dora"), ("dense", "activated"), ("soft", "lora")]
    jobs = []
    for at in range(count):
        text = [rng.randrange(3, 128) for _ in range(rng.randrange(1, 45))]
        text[len(text) // 2 : len(text) // 2] = [50, 51]
        uses = tuple(
            programs.use(name, 1.0 if name in ("bent", "soft") else 0.5 + at / 7) for name in choices[at % len(choices)]
        )
        jobs.append((text, uses, {"temperature": rng.choice([0.0, 0.9]), "top_p": rng.choice([1.0, 0.9]), "seed": at}))
    return jobs


def _said(driver: Any, jobs: list[Any], *, alone: bool) -> list[Any]:
    """Per job its tokens, and all log-probabilities as they came: floats compare by value, that is bit by bit."""
    ear, ids = Ear(driver), []
    for text, uses, sampling in jobs:
        options = {"max_tokens": 6, "logprobs": 20, "prompt_logprobs": 20} | sampling
        ids.append(driver.submit(text, *uses, **options))
        if alone:
            driver.run()
    driver.run()
    assert not driver.failures
    return [(driver.outputs[at], ear.prompt.get(at), ear.drawn[at]) for at in ids]


@BOTH
@DTYPES
def test_requests_have_the_same_bits_alone_together_and_in_any_chunks(
    architecture: str, dtype: str, make_driver: Callable[..., Any]
) -> None:
    expected: list[Any] = []
    for options in (
        {"max_batch_tokens": 2048},
        {"max_batch_tokens": 2048, "alone": False},
        {"max_batch_tokens": 37, "alone": False},
        {"max_batch_tokens": 11, "max_num_seqs": 5, "alone": False, "prefix_caching": False},
    ):
        alone = bool(options.pop("alone", True))
        driver = make_driver(architecture, dtype=dtype, deterministic=True, **options)
        programs = _programs(driver, architecture)
        said = _said(driver, _jobs(programs), alone=alone)
        expected = expected or said
        for one, other in zip(expected, said, strict=True):
            assert one == other
    assert len({str(tokens) for tokens, _, _ in expected}) > len(expected) // 2


def test_the_order_of_loads_does_not_order_the_sums(make_driver: Callable[..., Any]) -> None:
    said = []
    for first in ("lora", "dora"):
        driver = make_driver("llama", deterministic=True)
        programs = _programs(driver, "llama")
        driver.generate([5, 6], programs.use(first), max_tokens=1)
        job = (list(range(9, 40)), (programs.use("lora"), programs.use("dora", 0.7)), {"temperature": 0.0})
        said.append(_said(driver, [job], alone=True))
    assert said[0] == said[1]


def test_pages_of_the_prefix_cache_hold_the_same_bits(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", deterministic=True)
    programs = _programs(driver, "llama")
    jobs = [(text, uses, sampling | {"prompt_logprobs": None}) for text, uses, sampling in _jobs(programs)]
    first, second = (_said(driver, jobs, alone=False) for _ in range(2))
    assert first == second
    assert driver.engine.stats().cached_tokens > 0


@BOTH
@DTYPES
def test_logits_have_the_same_bits(architecture: str, dtype: str, make_driver: Callable[..., Any]) -> None:
    driver = make_driver(architecture, dtype=dtype, deterministic=True)
    programs = _programs(driver, architecture)
    jobs = [(text, uses) for text, uses, _ in _jobs(programs, 10) if not any(use.name == "soft" for use in uses)]
    jobs = [job for job in jobs if not any("soft" in use.digest or "activated" in use.digest for use in job[1])]
    alone = [driver.logprobs([job], 1)[0] for job in jobs]
    for chunk in (1, 5, 100):
        for one, other in zip(alone, driver.logprobs(jobs, chunk), strict=True):
            for position, row in other.items():
                assert torch.equal(row, one[position])


@BOTH
def test_it_says_what_the_fast_way_says(architecture: str, make_driver: Callable[..., Any]) -> None:
    said = []
    for deterministic in (False, True):
        driver = make_driver(architecture, deterministic=deterministic)
        said.append(_said(driver, _jobs(_programs(driver, architecture)), alone=False))
    for one, other in zip(*said, strict=True):
        assert one[0] == other[0]
        for a, b in zip([*(one[1] or ()), *one[2]], [*(other[1] or ()), *other[2]], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_a_kernel_that_tells_places_apart_gets_a_forward_for_each_row(make_driver: Callable[..., Any]) -> None:
    """A last row that rounds otherwise, as a vector loop's tail does."""
    expected: list[Any] = []
    for options in ({"max_batch_tokens": 64}, {"max_batch_tokens": 9}):
        driver = make_driver("llama", deterministic=True, **options)
        mlp = driver.engine.runner._base.model.model.layers[0].mlp
        plain = mlp.act_fn.forward

        def with_a_tail(x: torch.Tensor, plain: Any = plain) -> torch.Tensor:
            y: torch.Tensor = plain(x)
            y[:, 10:] *= 1 + 2e-7
            return y

        mlp.act_fn.forward = with_a_tail
        programs = _programs(driver, "llama")
        jobs = _jobs(programs, 5)
        said = _said(driver, jobs, alone=not expected)
        expected = expected or said
        assert said == expected
        assert set(driver.engine.runner._indifferent.values()) == {False}


def test_rows_that_read_their_neighbours_get_a_forward_for_each_row(make_driver: Callable[..., Any]) -> None:
    """As experts that gather the rows they get: the shape of their product follows from the neighbours."""
    driver = make_driver("llama", deterministic=True)
    mlp = driver.engine.runner._base.model.model.layers[0].mlp
    plain = mlp.act_fn.forward
    mlp.act_fn.forward = lambda x: plain(x) * (1 + 1e-6 * torch.tanh(x.mean()))
    with torch.inference_mode():
        assert not driver.engine.runner._is_indifferent(())


def test_places_are_indifferent_on_this_machine(make_driver: Callable[..., Any]) -> None:
    """Else every row costs a forward, and the tests above prove less than they seem to."""
    for architecture in ("llama", "gpt2"):
        driver = make_driver(architecture, deterministic=True)
        with torch.inference_mode():
            assert driver.engine.runner._is_indifferent(())
