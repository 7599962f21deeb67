"""What the CPU body does at one site for one plan, with every view, mask and row index prepared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.columns import Columns
from onebase.kernels.cpu_bags import Gathers, Rows, run_of
from onebase.kernels.cpu_split import CpuSplit, Ways
from onebase.kernels.low_rank_native import NativeRows, RowPairs
from onebase.kernels.packs import Panel, Panels, SitePack
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables, Use


@dataclass(frozen=True, slots=True)
class SoloStep:
    """One segment by itself, straight from the arena. a, b: None at rank 0; bias: [out_features] or None."""

    rows: slice
    a: Tensor | None
    b: Tensor | None
    scale: float
    bias: Tensor | None
    bias_scale: float


@dataclass(frozen=True, slots=True)
class Mask:
    """factor: [rows, columns] fp32 (float64), the scale where row and column belong together; other: where not."""

    factor: Tensor
    other: Tensor


@dataclass(slots=True)
class PackedStep:
    """The short segments of one panel. bias: [rows, out_features] or None."""

    rows: Rows
    pack: SitePack
    version: int
    mask: Mask | None
    bias: Tensor | None

    @property
    def stands(self) -> bool:
        return self.pack.version == self.version


@dataclass(frozen=True, slots=True)
class SiteStep:
    solo: tuple[SoloStep, ...]
    packed: tuple[PackedStep, ...]

    @property
    def stands(self) -> bool:
        """Whether the packs still have the layout that the masks were made for."""
        return all(step.stands for step in self.packed)


@dataclass(frozen=True, slots=True)
class PanelRows:
    """A panel's part of a plan: the rows that its short segments cover, in order."""

    panel: Panel
    rows: tuple[int, ...]
    index: Rows


@dataclass(slots=True)
class Schedule:
    """A plan's split into gathers, panels and lone segments, and the steps by site made so far.

    others: the segments of panels, and those on their own. homes: the panel's number of the first, by (start, handle).
    direct: gathers in C. generation: of the columns, when the gathers' programs were last seen to have theirs.
    """

    panels: tuple[PanelRows, ...]
    homes: dict[tuple[int, int], int]
    others: tuple[Segment, ...]
    gathers: Gathers | None
    direct: RowPairs | None
    generation: int
    steps: dict[int, SiteStep] = field(default_factory=dict)
    masks: dict[Hashable, Mask] = field(default_factory=dict)

    @property
    def stands(self) -> bool:
        """Whether its panels are still in use. A panel that was given up has no programs."""
        return all(part.panel.handles for part in self.panels)

    def placed(self, columns: Columns) -> bool:
        """Whether its gathers still find their programs' columns."""
        if self.generation != columns.generation:
            if self.gathers is not None and not columns.stand(self.gathers.starts):
                return False
            self.generation = columns.generation
        return True


def make_schedule(
    plan: BatchPlan, split: CpuSplit, tables: ProgramTables, gatherer: NativeRows | Columns, panels: Panels
) -> Schedule:
    """gatherer: what gathers are made by, in C, or where torch's find their columns."""
    ways = split.ways(plan)
    homes, parts = _panel_homes(ways.masked, panels)
    if isinstance(gatherer, NativeRows):
        chosen = frozenset(ways.gathered)
        gathers, direct, generation = None, gatherer.pairs(ways.gathered) if chosen else None, 0
    else:
        chosen, gathers = _placed(plan, split, tables, gatherer, ways)
        direct, generation = None, gatherer.generation
    others = tuple(segment for segment in plan.segments if segment not in chosen)
    return Schedule(parts, homes, others, gathers, direct, generation)


def _placed(
    plan: BatchPlan, split: CpuSplit, tables: ProgramTables, columns: Columns, ways: Ways
) -> tuple[frozenset[Segment], Gathers | None]:
    """The segments whose programs have found columns."""
    placed = columns.place({segment.handle: split.rank(segment.handle) for segment in ways.gathered})
    chosen = frozenset(segment for segment in ways.gathered if segment.handle in placed)
    gathered = [segment for segment in plan.segments if segment in chosen]
    starts = {handle: columns.starts[handle] for handle in placed}
    return chosen, Gathers(gathered, starts, tables) if gathered else None


def _panel_homes(masked: Sequence[Segment], panels: Panels) -> tuple[dict[tuple[int, int], int], tuple[PanelRows, ...]]:
    handles = sorted({segment.handle for segment in masked})
    placed = panels.place(handles) if handles else []
    numbers = {handle: number for number, (_, members) in enumerate(placed) for handle in members}
    homes = {(segment.start, segment.handle): numbers[segment.handle] for segment in masked}
    parts = [_panel_rows(panel, [s for s in masked if s.handle in members]) for panel, members in placed]
    return homes, tuple(parts)


def make_step(site: int, schedule: Schedule, tables: ProgramTables, panels: Panels) -> SiteStep:
    """Fill the site's packs with what the plan needs there, and prepare its step."""
    solo: list[SoloStep] = []
    together: list[list[Use]] = [[] for _ in schedule.panels]
    for use in tables.uses_of(site, schedule.others):
        if not use.op.rank and use.op.add_out < 0:
            continue
        home = schedule.homes.get((use.segment.start, use.segment.handle))
        if home is None or (use.op.rank and not panels.packable(site, use.segment.handle, use.op)):
            solo.append(_solo(site, use, tables))
        else:
            together[home].append(use)
    packed = [_packed(site, number, uses, schedule, tables) for number, uses in enumerate(together) if uses]
    return SiteStep(tuple(solo), tuple(packed))


def _panel_rows(panel: Panel, segments: Sequence[Segment]) -> PanelRows:
    rows = tuple(sorted({row for segment in segments for row in range(segment.start, segment.stop)}))
    return PanelRows(panel, rows, run_of(np.array(rows)))


def _solo(site: int, use: Use, tables: ProgramTables) -> SoloStep:
    segment, op = use
    a, b = tables.factors(site, op) if op.rank else (None, None)
    bias = tables.add_out(site, op) if op.add_out >= 0 else None
    return SoloStep(slice(segment.start, segment.stop), a, b, segment.scale * op.scale, bias, segment.scale)


def _packed(site: int, number: int, uses: Sequence[Use], schedule: Schedule, tables: ProgramTables) -> PackedStep:
    part = schedule.panels[number]
    pack = part.panel.pack(site)
    ranked = [use for use in uses if use.op.rank]
    pack.ensure({use.segment.handle: use.op for use in ranked})
    mask = _mask(number, pack, ranked, schedule, tables.buffer.dtype) if ranked else None
    return PackedStep(part.index, pack, pack.version, mask, _bias(site, part, uses, tables))


def _mask(number: int, pack: SitePack, uses: Sequence[Use], schedule: Schedule, dtype: torch.dtype) -> Mask:
    """Sites whose packs have the same layout and scales share one mask."""
    cells = [(use.segment, pack.columns[use.segment.handle], use.op.scale) for use in uses]
    key = (number, pack.used, tuple((segment.start, segment.handle, *cell) for segment, *cell in cells))
    if key not in schedule.masks:
        schedule.masks[key] = _draw_mask(schedule.panels[number], pack.used, cells, dtype)
    return schedule.masks[key]


def _draw_mask(
    part: PanelRows, columns: int, cells: Sequence[tuple[Segment, tuple[int, int], float]], dtype: torch.dtype
) -> Mask:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    factor = torch.zeros((len(part.rows), columns), dtype=wide)
    other = torch.ones_like(factor, dtype=torch.bool)
    for segment, (low, high), scale in cells:
        first = part.rows.index(segment.start)
        factor[first : first + segment.length, low:high] += segment.scale * scale
        other[first : first + segment.length, low:high] = False
    return Mask(factor, other)


def _bias(site: int, part: PanelRows, uses: Sequence[Use], tables: ProgramTables) -> Tensor | None:
    biased = [use for use in uses if use.op.add_out >= 0]
    if not biased:
        return None
    wide = torch.float64 if tables.buffer.dtype is torch.float64 else torch.float32
    bias = torch.zeros((len(part.rows), tables.sites[site].out_features), dtype=wide)
    for segment, op in biased:
        first = part.rows.index(segment.start)
        bias[first : first + segment.length] += segment.scale * tables.add_out(site, op)
    return bias.to(tables.buffer.dtype)
