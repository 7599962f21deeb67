"""The fast CPU body: each segment goes by gathers, by masked products, or by itself, as is estimated to be fastest.

A decode step of many adapters is then bound by reading weights, not by calls. Its parts: low_rank_native.py for
gathers in C, bags.py and cpu_bags.py for the same in torch where there is no compiler, packs.py and cpu_steps.py for
masked products, cpu_split.py and cpu_tuning.py for the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels import bags, prepack
from onebase.kernels.base import NOTHING, Shrunk, own
from onebase.kernels.columns import Columns
from onebase.kernels.cpu_bags import BagStep, Rows
from onebase.kernels.cpu_split import CpuSplit
from onebase.kernels.cpu_steps import PackedStep, Schedule, SiteStep, SoloStep, make_schedule, make_step
from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.low_rank_native import NativeRows, RowPairs
from onebase.kernels.packs import Panels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import ProgramTables, Use
from onebase.kernels.vectors import Vectors


@dataclass(frozen=True, slots=True)
class SiteShrunk:
    """xa of a site's steps, in their order; scaled and masked already where packed. None at rank 0."""

    step: SiteStep
    solo: list[Tensor | None]
    packed: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class CpuShrunk(Shrunk):
    """samples: xa of the gathers, scaled, of all sites of the group. None where no segment goes that way.

    direct: the rows that are shrunk and expanded in one call, when they are expanded; they read x then.
    """

    sites: dict[int, SiteShrunk]
    step: BagStep | None
    samples: Tensor | None
    x: Tensor
    direct: RowPairs | None


class CpuKernels:
    """See LowRankKernels. xa has the model's dtype, as in PEFT; products accumulate in fp32."""

    name = "cpu"

    def __init__(
        self,
        tables: ProgramTables,
        tuning: CpuTuning = CpuTuning(),  # noqa: B008 (frozen)
        *,
        compiled: bool = True,
    ) -> None:
        """compiled: gathers in C where there is a library; False: in torch."""
        self._tables = tables
        self._vectors = Vectors(tables)
        self._native = NativeRows.of(tables) if compiled else None
        gathers = self._native is not None or bags.supported()
        self._split = CpuSplit(tables, tuning if gathers else replace(tuning, gather=math.inf))
        self._columns = Columns(tables)
        self._panels = Panels(tables, tuning.prepack_after if prepack.supported(tables.buffer.dtype) else None)
        self._schedules: WeakKeyDictionary[BatchPlan, Schedule] = WeakKeyDictionary()
        self._rows_of_a = {
            site.in_features: bags.rows_anywhere(tables.buffer, site.in_features) for site in tables.sites
        }

    def shrink(self, x: Tensor, group: tuple[int, ...], plan: BatchPlan) -> CpuShrunk:
        self._tables.check(plan)
        schedule, taken, sites = self._schedule(plan), dict[int, Tensor](), dict[int, SiteShrunk]()
        if schedule.others:
            sites = {site: _shrink(x, self._step(site, schedule), taken) for site in group}
        if schedule.direct is not None:
            schedule.direct.check(group)
        if schedule.gathers is None:
            return CpuShrunk(sites, None, None, x, schedule.direct)
        step = schedule.gathers.step(group)
        return CpuShrunk(sites, step, self._gather(x, step), x, None)

    def expand(self, y: Tensor, shrunk: Shrunk, site: int, plan: BatchPlan) -> None:
        self.expand_group((y,), shrunk, (site,), plan)

    def expand_group(
        self,
        ys: Sequence[Tensor],
        shrunk: Shrunk,
        sites: tuple[int, ...],
        plan: BatchPlan,
        origins: Mapping[int, Tensor] = NOTHING,
    ) -> None:
        whole = own(shrunk, CpuShrunk)
        self._vectors.map_outputs(ys, sites, plan, origins)
        if whole.direct is not None and self._native is not None:
            self._native.add(ys, whole.x, sites, whole.direct)
        if whole.step is None and not whole.sites:
            return
        for y, site in zip(ys, sites, strict=True):
            if whole.step is not None:
                self._add_sums(y, whole.step, whole.samples, site)
            if site in whole.sites:
                _expand_site(y, whole.sites[site])

    def scale_in(self, target: Tensor, x: Tensor, site: int, plan: BatchPlan) -> None:
        self._vectors.scale_in(target, x, site, plan)

    def token_low_rank(self, y: Tensor, tokens: Tensor, site: int, plan: BatchPlan) -> None:
        for use in self._tables.uses(site, plan, token=True):
            self._token_segment(y, tokens, site, use)

    def forget(self, handle: int) -> None:
        self._columns.forget(handle)
        self._panels.forget(handle)
        self._split.forget(handle)
        self._keep_schedules(lambda plan, schedule: handle not in plan.handles and schedule.stands)

    def warm_up(self, groups: Iterable[tuple[int, ...]] = ()) -> None:
        """Nothing is compiled."""

    def _keep_schedules(self, condition: Callable[[BatchPlan, Schedule], bool]) -> None:
        """Schedules hold packs, so they live here and not on the plans, which others keep for their own reasons."""
        for plan in [plan for plan, schedule in self._schedules.items() if not condition(plan, schedule)]:
            del self._schedules[plan]

    def _step(self, site: int, schedule: Schedule) -> SiteStep:
        step = schedule.steps.get(site)
        if step is None or not step.stands:
            step = schedule.steps[site] = make_step(site, schedule, self._tables, self._panels)
        return step

    def _schedule(self, plan: BatchPlan) -> Schedule:
        schedule = self._schedules.get(plan)
        if schedule is None or not schedule.placed(self._columns):
            schedule = self._schedules[plan] = make_schedule(
                plan, self._split, self._tables, self._native or self._columns, self._panels
            )
            self._keep_schedules(lambda _, kept: kept.stands)
        return schedule

    def _gather(self, x: Tensor, step: BagStep) -> Tensor | None:
        if not len(step.index):
            return None
        samples = bags.dots(x, self._rows_of_a[x.shape[1]], step.index, step.bags)
        return samples if step.scale is None else samples.mul_(step.scale)

    def _add_sums(self, y: Tensor, step: BagStep, samples: Tensor | None, site: int) -> None:
        member = step.members[site]
        if member.profile is not None and samples is not None:
            profile, matrix = member.profile, self._columns.matrix(site)
            _add_rows(y, profile.rows, bags.sums(samples[member.samples], matrix, profile.columns, profile.offsets))
        if member.bias is not None:
            _add_rows(y, *member.bias)

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


def _expand_site(y: Tensor, shrunk: SiteShrunk) -> None:
    for solo, xa in zip(shrunk.step.solo, shrunk.solo, strict=True):
        _expand_solo(y, solo, xa)
    for packed, xa in zip(shrunk.step.packed, shrunk.packed, strict=True):
        _expand_packed(y, packed, xa)


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
