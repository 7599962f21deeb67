"""A sweep over a real server: every point is a load run, and what is stored is the curve and where it breaks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from onebase.bench.load.options import Options
from onebase.bench.load.result import LoadResult
from onebase.bench.load.run import View, run
from onebase.bench.report import machine
from onebase.bench.sweep import Point, Range, Search

Axis = Literal["rate", "adapters"]


@dataclass(frozen=True, slots=True)
class Plan:
    """options: what stays the same. axis: what is varied. target: the attainment that holds."""

    options: Options
    axis: Axis
    range: Range
    target: float

    def at(self, value: float, seed: int) -> Options:
        workload = replace(self.options.workload, seed=self.options.workload.seed + seed)
        if self.axis == "rate":
            return replace(self.options, workload=replace(workload, rate=value))
        return replace(self.options, workload=workload, adapters=int(value))


@dataclass(slots=True)
class Sweep:
    """results: a load run for each point, in order of time. highest: the value that holds; None: none does."""

    plan: Plan
    view: View
    results: list[LoadResult] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    highest: float | None = None

    async def run(self) -> None:
        """Raises what load.run.run raises."""
        search = Search(self._measure, self.plan.target, self.plan.range, self.points)
        self.highest = await search.run()

    async def _measure(self, value: float, seed: int) -> float:
        result = await run(self.plan.at(value, seed), self.view, machine())
        self.results.append(result)
        attainment = result.summary.attainment
        print(
            f"{self.plan.axis} {value:g}: attainment {attainment:.1%}, {result.summary.tokens_per_second:.1f} tokens/s"
        )
        return attainment

    def described(self) -> dict[str, Any]:
        """What is stored."""
        options = self.plan.options
        points = [_row(point, result) for point, result in zip(self.points, self.results, strict=True)]
        return {
            "axis": self.plan.axis,
            "target": self.plan.target,
            "highest": self.highest,
            "workload": asdict(options.workload) | {"slo": asdict(options.slo)},
            "points": points,
            "client": {"warnings": sorted({text for result in self.results for text in result.client.warnings})},
        }


def _row(point: Point, result: LoadResult) -> dict[str, Any]:
    summary = result.summary
    row: dict[str, Any] = {
        "value": point.value,
        "seed": point.seed,
        "attainment": point.attainment,
        "tokens_per_second": summary.tokens_per_second,
        "goodput": summary.goodput,
        "offered": summary.offered,
        "ok": summary.ok,
        "rejected": summary.rejected,
        "failed": summary.failed,
    }
    for name, stats in (("ttft", summary.ttft), ("itl", summary.itl)):
        if stats is not None:
            row |= {f"{name}_p50_ms": 1e3 * stats.p50, f"{name}_p99_ms": 1e3 * stats.p99}
    return row
