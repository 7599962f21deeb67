"""Requests that share a long beginning and an adapter, with the prefix cache and without; and over two adapters."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onebase.bench.ours import Run, closed_loop, make_resident
from onebase.bench.report import Spread, ratio, show, store
from onebase.bench.step import save_adapter
from onebase.bench.workload import SHAPES, random_model
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.model.loader import prepare

TARGET = 20.0  # times the throughput without a cache


@dataclass(frozen=True, slots=True)
class Plan:
    """shared: tokens that all prompts begin with; own: that follow in each; tokens_out: of each answer."""

    shape: str = "135m"
    requests: int = 100
    shared: int = 512
    own: int = 8
    tokens_out: int = 2
    rank: int = 8
    rounds: int = 3

    def prompts(self, seed: int) -> list[list[int]]:
        random, most = np.random.default_rng(seed), SHAPES[self.shape].vocab_size
        shared = [int(token) for token in random.integers(10, most, self.shared)]
        return [[*shared, *(int(t) for t in random.integers(10, most, self.own))] for _ in range(self.requests)]


def run(plan: Plan, device: str, out: Path | None) -> None:
    """Print requests a second of both sides, and what the cache gave."""
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as name:
        folders = [Path(name) / str(index) for index in range(2)]
        cached, plain = (_engine(plan, device, folders, caching=caching) for caching in (True, False))
        for engine in (cached, plain):
            _run(engine, plan, folders[:1], seed=0, count=8)  # warm-up
        runs: dict[str, list[Run]] = {"cache": [], "none": []}
        before = cached.stats().cached_tokens
        for seed in range(1, plan.rounds + 1):
            runs["cache"].append(_run(cached, plan, folders[:1], seed))
            runs["none"].append(_run(plain, plan, folders[:1], seed))
        given = cached.stats().cached_tokens - before
        across = _hits_across(cached, plan, folders)
    _report(plan, runs, given / (plan.rounds * plan.requests), across, out)


def _engine(plan: Plan, device: str, folders: list[Path], *, caching: bool) -> Engine:
    config = EngineConfig(
        model=plan.shape, device=device, kv_memory=1.0, adapter_memory=0.2, prefix_caching=caching, max_model_len=1024
    )
    base = prepare(random_model(plan.shape, torch.bfloat16, device), config)
    for index, folder in enumerate(folders):
        if not folder.exists():
            save_adapter(base, folder, plan.rank, index)
    engine = Engine(config, base)
    make_resident(engine, folders)
    return engine


def _run(engine: Engine, plan: Plan, folders: list[Path], seed: int, count: int | None = None) -> Run:
    """All requests at once, over the adapters in turn."""
    prompts = plan.prompts(seed)[:count]
    adapters = [folders[index % len(folders)] for index in range(len(prompts))]
    return closed_loop(engine, prompts, adapters, plan.tokens_out, clients=len(prompts))


def _hits_across(engine: Engine, plan: Plan, folders: list[Path]) -> int:
    """Tokens that a request found of one that began alike over another adapter."""
    _run(engine, plan, folders[:1], seed=99, count=1)
    before = engine.stats().cached_tokens
    _run(engine, plan, folders[1:], seed=99, count=1)
    return engine.stats().cached_tokens - before


def _report(plan: Plan, runs: dict[str, list[Run]], given: float, across: int, out: Path | None) -> None:
    rates = {name: [plan.requests / run.seconds for run in several] for name, several in runs.items()}
    faster = ratio(rates["cache"], rates["none"])
    rows = {f"{name}: requests a second": str(Spread(tuple(values))) for name, values in rates.items()}
    rows |= {
        f"ratio (target: at least {TARGET:g})": f"{faster:.1f}",
        "cached tokens, mean of a request": f"{given:.0f}",
        "cached tokens across adapters (target: 0)": str(across),
    }
    show(f"{plan.requests} requests that share {plan.shared} tokens, {plan.tokens_out} out, {plan.shape}", rows)
    store(out, "shared-prefix", {"requests_per_second": rates, "ratio": faster, "across": across, "target": TARGET})
