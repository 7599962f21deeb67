"""Eight tenants, one of which sends twenty times the load of each other one: what the others notice of it.

Both sides in one run, round by round: the others' first tokens with the flood and without it. The flood's requests
are as long as the others'; what is left of them when the others are done is aborted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from onebase.bench.drive import Driver, Job, Run
from onebase.bench.report import Spread, ratio, show, store
from onebase.bench.traffic import Traffic
from onebase.bench.workload import SHAPES, random_model
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.model.loader import prepare

TARGET = 1.5  # times the others' p90 time to first token without the flood
FLOOD = "flood"


@dataclass(frozen=True, slots=True)
class Plan:
    """others: tenants beside the flood; rate: requests a second of each; times: what the flood sends of that; seconds:
    of arrivals in one round; seats: sequences that run at once."""

    shape: str = "135m"
    others: int = 7
    times: float = 20.0
    rate: float = 0.3
    seconds: float = 30.0
    tokens_in: tuple[int, int] = (96, 161)
    tokens_out: tuple[int, int] = (24, 41)
    seats: int = 16
    rounds: int = 3

    def jobs(self, seed: int, *, flood: bool) -> list[Job]:
        """The others' times and lengths are the same with the flood and without it, their tokens are not: no side finds
        the other one's in the prefix cache."""
        random = np.random.default_rng(2 * seed + flood)
        jobs = [
            job
            for tenant in range(self.others)
            for job in self._of(f"tenant-{tenant}", self.rate, 100 * seed + tenant, random, watched=True)
        ]
        return jobs + (self._of(FLOOD, self.times * self.rate, 100 * seed + 99, random, watched=False) if flood else [])

    def _of(self, tenant: str, rate: float, seed: int, random: np.random.Generator, *, watched: bool) -> list[Job]:
        traffic = Traffic(1, 1.0, rate, self.seconds, 1.0, self.tokens_in, self.tokens_out, seed)
        vocab_size = SHAPES[self.shape].vocab_size
        return [
            Job(
                None,
                tuple(int(token) for token in random.integers(10, vocab_size, arrival.tokens_in)),
                arrival.tokens_out,
                arrival.at,
                watched,
                tenant,
            )
            for arrival in traffic.arrivals()
        ]


def run(plan: Plan, device: str, out: Path | None) -> None:
    """Print the others' p90 times to first token, and store them."""
    engine = _engine(plan, device)
    Driver(engine).run(replace(plan, seconds=max(8.0, 2 / plan.rate), others=2).jobs(0, flood=False))  # warm-up
    alone, beside = list[Run](), list[Run]()
    for seed in range(1, plan.rounds + 1):
        alone.append(Driver(engine).run(plan.jobs(seed, flood=False), to_end=False))
        beside.append(Driver(engine).run(plan.jobs(seed, flood=True), to_end=False))
    _report(plan, alone, beside, engine.scheduler.preemptions, out)


def _engine(plan: Plan, device: str) -> Engine:
    config = EngineConfig(
        model=plan.shape,
        device=device,
        max_num_seqs=plan.seats,
        max_model_len=1024,
        kv_memory=1.0,
        adapter_memory=0.1,
    )
    return Engine(config, prepare(random_model(plan.shape, torch.bfloat16, device), config))


def _report(plan: Plan, alone: list[Run], beside: list[Run], preemptions: int, out: Path | None) -> None:
    times = {name: [1e3 * run.ttft(90) for run in runs] for name, runs in (("alone", alone), ("beside", beside))}
    gaps = {name: [1e3 * run.gap(50) for run in runs] for name, runs in (("alone", alone), ("beside", beside))}
    worse = ratio(times["beside"], times["alone"])
    rows = {
        "others' p90 first token without the flood, ms": str(Spread(tuple(times["alone"]))),
        "others' p90 first token beside it, ms": str(Spread(tuple(times["beside"]))),
        f"ratio (target: at most {TARGET})": f"{worse:.2f}",
        "others' median between tokens without / beside, ms": " / ".join(str(Spread(tuple(g))) for g in gaps.values()),
        "requests of the others / of the flood, a round": f"{len(alone[0].watched)} / {_floods(beside[0])}",
        "preemptions": str(preemptions),
    }
    show(f"{plan.others} tenants and one that sends {plan.times:g} times as much, {plan.shape}", rows)
    store(out, "fair", {"ttft_p90_ms": times, "gap_p50_ms": gaps, "ratio": worse, "target": TARGET})


def _floods(run: Run) -> int:
    return sum(not trace.job.watched for trace in run.traces)
