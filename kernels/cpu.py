"""The fast CPU body: short segments share masked products over packs, long ones read the arena directly.

One masked pair of products per panel and site replaces a pair of small products per adapter: a decode step of
many adapters is then bound by reading weights, not by calls. docs of the parts: packs.py, cpu_split.py, cpu_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels.base import Shrunk, own
from onebase.kernels.cpu_split import CpuSplit, CpuTuning
from onebase.kernels.cpu_steps import PackedStep, Rows, Schedule, SiteStep, SoloStep, make_schedule, make_step
from onebase.kernels.packs import Panels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.prepack import supported
from onebase.kernels.tables import ProgramTables, Use


@dataclass(frozen=True, slots=True)
class SiteShrunk:
    """xa of a site's steps, in their order; scaled and masked already where packed. None at rank 0."""

    step: SiteStep
    solo: list[Tensor | None]
    packed: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class CpuShrunk(Shrunk):
    sites: dict[int, SiteShrunk]


class CpuKernels:
    """See LowRankKernels. xa has the model's dtype, as in PEFT; products accumulate in fp32."""

    name = "cpu"

    def __init__(self, tables: ProgramTables, tuning: CpuTuning = CpuTuning()) -> None:  # noqa: B008 (frozen)
        self._tables = tables
        self._split = CpuSplit(tables, tuning)
        self._panels = Panels(tables, tuning.prepack_after if supported(tables.buffer.dtype) else None)
        self._schedules: WeakKeyDictionary[BatchPlan, Schedule] = WeakKeyDictionary()

    def shrink(self, x: Tensor, group: tuple[int, ...], plan: BatchPlan) -> CpuShrunk:
        self._tables.check(plan)
        gathered: dict[int, Tensor] = {}
        return CpuShrunk({site: _shrink(x, self._step(site, plan), gathered) for site in group})

    def expand(self, y: Tensor, shrunk: Shrunk, site: int, plan: BatchPlan) -> None:
        mine = own(shrunk, CpuShrunk).sites[site]
        for solo, xa in zip(mine.step.solo, mine.solo, strict=True):
            _expand_solo(y, solo, xa)
        for packed, xa in zip(mine.step.packed, mine.packed, strict=True):
            _expand_packed(y, packed, xa)

    def token_low_rank(self, y: Tensor, tokens: Tensor, site: int, plan: BatchPlan) -> None:
        for use in self._tables.uses(site, plan, token=True):
            self._token_segment(y, tokens, site, use)

    def forget(self, handle: int) -> None:
        self._panels.forget(handle)
        self._split.forget(handle)
        self._keep_schedules(lambda plan, schedule: handle not in plan.handles and schedule.stands)

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def _keep_schedules(self, condition: Callable[[BatchPlan, Schedule], bool]) -> None:
        """Schedules hold packs, so they live here and not on the plans, which others keep for their own reasons."""
        for plan in [plan for plan, schedule in self._schedules.items() if not condition(plan, schedule)]:
            del self._schedules[plan]

    def _step(self, site: int, plan: BatchPlan) -> SiteStep:
        schedule = self._schedules.get(plan) or self._schedule(plan)
        step = schedule.steps.get(site)
        if step is None or not step.stands:
            step = schedule.steps[site] = make_step(site, plan, schedule, self._tables, self._panels)
        return step

    def _schedule(self, plan: BatchPlan) -> Schedule:
        schedule = make_schedule(plan, self._split.masked(plan), self._panels)
        self._keep_schedules(lambda _, kept: kept.stands)
        self._schedules[plan] = schedule
        return schedule

    def _token_segment(self, y: Tensor, tokens: Tensor, site: int, use: Use) -> None:
        segment, op = use
        rows = y[segment.start : segment.stop]
        if op.rank:
            a, b = self._tables.factors(site, op)
            rows.addmm_(a[tokens[segment.start : segment.stop]], b, alpha=segment.scale * op.scale)
        if op.add_out >= 0:
            rows.add_(self._tables.add_out(site, op), alpha=segment.scale)


def _shrink(x: Tensor, step: SiteStep, gathered: dict[int, Tensor]) -> SiteShrunk:
    solo = [None if part.a is None else linear(x[part.rows], part.a) for part in step.solo]
    return SiteShrunk(step, solo, [_shrink_packed(x, part, gathered) for part in step.packed])


def _shrink_packed(x: Tensor, step: PackedStep, gathered: dict[int, Tensor]) -> Tensor | None:
    """The mask scales first and clears then: a neighbour's overflow times zero would not be zero."""
    if step.mask is None:
        return None
    xa = step.pack.shrink(_take(x, step.rows, gathered))
    return xa.mul_(step.mask.factor).masked_fill_(step.mask.other, 0)


def _take(x: Tensor, rows: Rows, gathered: dict[int, Tensor]) -> Tensor:
    if isinstance(rows, slice):
        return x[rows]
    if id(rows) not in gathered:
        gathered[id(rows)] = x.index_select(0, rows)
    return gathered[id(rows)]


def _expand_solo(y: Tensor, step: SoloStep, xa: Tensor | None) -> None:
    rows = y[step.rows]
    if xa is not None and step.b is not None:
        rows.addmm_(xa, step.b, alpha=step.scale)
    if step.bias is not None:
        rows.add_(step.bias, alpha=step.bias_scale)


def _expand_packed(y: Tensor, step: PackedStep, xa: Tensor | None) -> None:
    if xa is not None:
        _add_product(y, step, xa)
    if step.bias is not None:
        _add_rows(y, step.rows, step.bias)


def _add_product(y: Tensor, step: PackedStep, xa: Tensor) -> None:
    if isinstance(step.rows, slice):
        step.pack.expand_onto(y[step.rows], xa)
    else:
        y.index_add_(0, step.rows, step.pack.expand(xa))


def _add_rows(y: Tensor, rows: Rows, delta: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows].add_(delta)
    else:
        y.index_add_(0, rows, delta)
