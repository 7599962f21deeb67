"""A long prompt arrives among streams: what it does to the time between their tokens, with the pace and without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onebase.bench.drive import Driver, Job, Run
from onebase.bench.report import Spread, show, store
from onebase.bench.workload import SHAPES, random_model
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.pace import Pace
from onebase.serve.model.loader import prepare

TARGET = 2.5  # times the median between two tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """streams: that decode; tokens_out: of each; prompt: tokens of the long one; stretch: see EngineConfig."""

    shape: str = "135m"
    streams: int = 15
    tokens_out: int = 192
    prompt: int = 2000
    stretch: float = 2.2
    rounds: int = 3


def run(plan: Plan, device: str, out: Path | None) -> None:
    """Print p99 / median between the streams' tokens, and when the prompt had its first token."""
    config = EngineConfig(
        model=plan.shape,
        device=device,
        max_num_seqs=plan.streams + 1,
        kv_memory=1.0,
        adapter_memory=0.1,
        prefix_caching=False,  # both sides compute the same prompts
    )
    engine = Engine(config, prepare(random_model(plan.shape, torch.bfloat16, device), config))
    sides = {f"stretch {plan.stretch:g}": plan.stretch, "no bound": 0.0}
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for round_ in range(plan.rounds + 1):
        for name, stretch in sides.items():
            engine.scheduler.pace = Pace(stretch)
            one = _round(engine, plan, round_)
            if round_:  # the first one is the warm-up
                runs[name].append(one)
    _report(plan, runs, out)


def _round(engine: Engine, plan: Plan, seed: int) -> Run:
    """The prompt comes once all streams have had some tokens."""
    random, vocab_size = np.random.default_rng(seed), SHAPES[plan.shape].vocab_size

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(10, vocab_size, length))

    alone = Driver(engine, plan.streams).run([Job(None, prompt(64), 16) for _ in range(plan.streams)])
    late = 1.2 * alone.seconds
    streams = [Job(None, prompt(64), plan.tokens_out) for _ in range(plan.streams)]
    return Driver(engine, plan.streams).run([*streams, Job(None, prompt(plan.prompt), 2, late, watched=False)])


def _report(plan: Plan, runs: dict[str, list[Run]], out: Path | None) -> None:
    result, rows = {}, {}
    for name, several in runs.items():
        first = [next(trace.ttft for trace in run.traces if not trace.job.watched) for run in several]
        ratios = [run.gap(99) / run.gap(50) for run in several]
        result[name] = {
            "p99_over_median": ratios,
            "prompt_ttft_s": first,
            "median_ms": [1e3 * r.gap(50) for r in several],
        }
        rows[f"{name}: p99 / median between tokens"] = str(Spread(tuple(ratios)))
        rows[f"{name}: first token of the prompt, s"] = str(Spread(tuple(first)))
    rows["target for p99 / median"] = f"at most {TARGET}"
    show(f"a prompt of {plan.prompt} tokens among {plan.streams} streams, {plan.shape}", rows)
    store(out, "long-prompt", {"sides": result, "target": TARGET})
