"""Adapters that come and go: more of them than the device holds, beside the same load on those that fit.

Ours on both sides, in this process, on one engine; rounds are interleaved and ratios taken round by round. What others
do past their number of slots is in the literature: 16 adapters on 8 slots took 6.3 s to a median first token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from onebase.bench.bed import Bench, Plan, make_bench
from onebase.bench.cold import cold_starts
from onebase.bench.drive import Driver, Run
from onebase.bench.ours import make_resident
from onebase.bench.report import Spread, ratio, show, store
from onebase.bench.traffic import Arrival


def run(plan: Plan, only: Sequence[str], out: Path | None, folder: Path | None = None) -> None:
    """Print every scenario, and store the figures. only: names of scenarios; none: all. folder: where the adapters are
    made, and left for the next run; a temporary one unless given."""
    results: dict[str, Any] = {}
    with ExitStack() as cleanup:
        where = folder or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="onebase-bench-")))
        for scenario, measure in SCENARIOS.items():
            if not only or scenario in only:
                results[scenario] = measure(plan, where)
                store(out, "lifecycle", {"plan": _plain(plan), "results": results})


def overcommit(plan: Plan, folder: Path) -> dict[str, Any]:
    """Closed loops over few adapters that fit and over many that do not, at each popularity."""
    bench = make_bench(plan, folder, plan.room, plan.registered)
    return {f"alpha {alpha:g}": _overcommit_at(bench, alpha) for alpha in plan.alphas}


def _overcommit_at(bench: Bench, alpha: float) -> dict[str, Any]:
    plan, runs = bench.plan, dict[str, list[Run]]()
    sides = {f"{plan.fit} that fit": plan.fit, f"{plan.registered} on room for {plan.room}": plan.registered}
    loads: dict[str, int] = {}
    for seed in range(-1, plan.rounds):  # the first one warms up
        for side, adapters in sides.items():
            arrivals = bench.arrivals(adapters, alpha, plan.requests, 1.0, seed + 1)
            jobs = bench.jobs(arrivals, [a.adapter for a in arrivals], timed=False, watched=True)
            before = bench.engine.stats().adapter_loads
            done = Driver(bench.engine, plan.clients).run(jobs)
            if seed >= 0:
                runs.setdefault(side, []).append(done)
                loads[side] = loads.get(side, 0) + bench.engine.stats().adapter_loads - before
    few, many = runs.values()
    figures = {f"{side}, tokens/s": [run.tokens_per_second for run in several] for side, several in runs.items()} | {
        f"{side}, longest TTFT s": [run.ttft(100) for run in several] for side, several in runs.items()
    }
    ratios = {
        "throughput, many / few": ratio(*([r.tokens_per_second for r in side] for side in (many, few))),
        "median TTFT, many / few": ratio(*([r.ttft(50) for r in side] for side in (many, few))),
        "longest TTFT, many / few": ratio(*([r.ttft(100) for r in side] for side in (many, few))),
    }
    return _shown(f"{plan.clients} clients, alpha {alpha:g}", figures, ratios) | {"loads": loads}


def beside_loads(plan: Plan, folder: Path) -> dict[str, Any]:
    """Streams over resident adapters, while other requests come over resident or over cold ones."""
    bench = make_bench(plan, folder, plan.room, plan.registered)
    runs: dict[str, list[Run]] = {"resident": [], "cold": []}
    cold = iter(range(plan.fit, plan.registered))
    for seed in range(-1, plan.rounds):
        make_resident(bench.engine, bench.folders[: plan.fit])
        for side, several in runs.items():
            arrivals = bench.arrivals(plan.fit, 1.0, plan.requests // 4, 1.0, seed + 1)
            adapters = [next(cold) if side == "cold" else a.adapter for a in arrivals]
            others = bench.jobs(arrivals, adapters, timed=True, watched=False)
            streams = [Arrival(0.0, i, 128, 4 * plan.tokens_out[1]) for i in range(plan.clients // 2)]
            watched = bench.jobs(streams, [a.adapter for a in streams], timed=False, watched=True)
            done = Driver(bench.engine, len(watched)).run([*watched, *others])
            if seed >= 0:
                several.append(done)
    figures = {
        f"beside {side} adapters, p99 gap ms": [1e3 * r.gap(99) for r in several] for side, several in runs.items()
    }
    figures |= {
        f"beside {side} adapters, median gap ms": [1e3 * r.gap(50) for r in several] for side, several in runs.items()
    }
    ratios = {
        f"{name} gap, beside cold / beside resident": ratio(
            *([r.gap(q) for r in runs[s]] for s in ("cold", "resident"))
        )
        for name, q in (("p99", 99), ("median", 50))
    }
    return _shown("inter-token latency of resident adapters' streams", figures, ratios)


def turns(plan: Plan, folder: Path) -> dict[str, Any]:
    """Sixteen adapters on room for eight, beside eight on the same room: requests come at the same times."""
    bench = make_bench(plan, folder, 8, 16)
    runs: dict[int, list[Run]] = {8: [], 16: []}
    rate = _rate(bench)
    for seed in range(-1, plan.rounds):
        for adapters, several in runs.items():
            arrivals = bench.arrivals(adapters, 1.0, plan.requests // 2, rate, seed + 1)
            jobs = bench.jobs(arrivals, [a.adapter for a in arrivals], timed=True, watched=True)
            done = Driver(bench.engine).run(jobs)
            if seed >= 0:
                several.append(done)
    figures = {f"{n} adapters, median TTFT ms": [1e3 * run.ttft(50) for run in several] for n, several in runs.items()}
    figures |= {f"{n} adapters, p99 TTFT ms": [1e3 * run.ttft(99) for run in several] for n, several in runs.items()}
    ratios = {"median TTFT, 16 / 8": ratio(*([run.ttft(50) for run in runs[n]] for n in (16, 8)))}
    return _shown(f"16 adapters on room for 8, {rate:.2f} requests/s", figures, ratios)


def cold(plan: Plan, folder: Path) -> dict[str, Any]:
    """From disk to the first token, beside reading the same bytes from disk and a warm first token."""
    count = min(16, plan.registered)
    bench = make_bench(plan, folder, plan.room, count, host_cache=0.0)
    starts = cold_starts(bench.engine, bench.folders, folder / "compiled")
    figures = {
        "cold first token ms": [1e3 * one.cold for one in starts],
        "reading the bytes ms": [1e3 * one.read for one in starts],
        "warm first token ms": [1e3 * one.warm for one in starts],
    }
    floor = [one.read + one.warm for one in starts]
    return _shown(
        "cold adapter, disk to first token", figures, {"cold / floor": ratio([one.cold for one in starts], floor)}
    )


SCENARIOS: Mapping[str, Callable[[Plan, Path], dict[str, Any]]] = {
    "overcommit": overcommit,
    "beside-loads": beside_loads,
    "turns": turns,
    "cold": cold,
}


def _rate(bench: Bench) -> float:
    """Requests a second: half of what a closed loop over the eight adapters that fit gets."""
    arrivals = bench.arrivals(8, 1.0, 2 * bench.plan.clients, 1.0, 99)
    jobs = bench.jobs(arrivals, [a.adapter for a in arrivals], timed=False, watched=True)
    Driver(bench.engine, bench.plan.clients).run(jobs)
    done = Driver(bench.engine, bench.plan.clients).run(jobs)
    return 0.5 * len(jobs) / done.seconds


def _shown(title: str, figures: Mapping[str, Sequence[float]], ratios: Mapping[str, float]) -> dict[str, Any]:
    rows = {name: str(Spread(tuple(values))) for name, values in figures.items()}
    show(title, rows | {name: f"{value:.2f}" for name, value in ratios.items()})
    return {"figures": dict(figures), "ratios": dict(ratios)}


def _plain(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}
