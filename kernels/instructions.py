"""InstructionTable: the installed programs' instructions by site, and what a plan makes of them.

The low-rank part of programs lives in ProgramTables; here is everything else. Sites are named by path. Segments of a
plan that have the same kind of instruction at a site become one Work, so that a body sees all its rows at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Instruction, Phase, RowInstruction, wide
from onebase.kernels.plan import BatchPlan, Segment


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Row instructions of one kind at one site; no row occurs twice.

    rows: a slice where the segments follow each other, else int64 indices. scale: None where every segment's is one.
    """

    kind: type[RowInstruction]
    ops: tuple[RowInstruction, ...]
    lengths: tuple[int, ...]
    rows: slice | Tensor
    scale: float | Tensor | None

    def delta(self, source: Tensor) -> Tensor:
        """What it adds, [its rows, width of the target], times the segments' scales."""
        delta = wide(self.kind.batched(self.ops, self.lengths, _take(source, self.rows)))
        return delta if self.scale is None else delta * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class SiteWork:
    """All row instructions of a plan at one linear site, by phase."""

    inputs: tuple[Work, ...]
    maps: tuple[Work, ...]
    adds: tuple[Work, ...]

    @property
    def changes_output(self) -> bool:
        return bool(self.maps or self.adds)

    def change_input(self, x: Tensor) -> Tensor:
        """x [rows, in_features] as the base is to read it; x itself where nothing changes it."""
        return x if not self.inputs else added(x.clone(), self.inputs, x)

    def change_output(self, y: Tensor, x: Tensor) -> None:
        """Add the map and add deltas to y [rows, out_features], in place. x: as the site was called with it."""
        added(y, self.maps, y)
        for work in self.adds:
            _add(y, work, work.delta(x))


@dataclass(frozen=True, slots=True)
class Placed:
    """One instruction over one segment, for sites whose instructions are not row instructions."""

    segment: Segment
    op: Instruction


class InstructionTable:
    """The installed programs, by handle. A program's instructions never change once installed."""

    def __init__(self) -> None:
        self._programs: dict[int, Mapping[str, tuple[Instruction, ...]]] = {}

    def install(self, handle: int, instructions: Mapping[str, tuple[Instruction, ...]]) -> None:
        """Make a program's instructions usable by plans. Raises ValueError for a handle that is taken."""
        if handle in self._programs:
            raise ValueError(f"handle: {handle} is installed already")
        self._programs[handle] = dict(instructions)

    def remove(self, handle: int) -> None:
        """Forget a program. Raises KeyError where it is not installed."""
        del self._programs[handle]

    def touched(self, plan: BatchPlan) -> frozenset[str]:
        """The sites at which any program of the plan has instructions."""
        return plan.memo((self, "touched"), lambda: self._touched(plan))

    def placed(self, site: str, plan: BatchPlan) -> tuple[Placed, ...]:
        """Every instruction of the plan's segments at a site, in the order of the segments."""
        return plan.memo((self, "placed", site), lambda: self._placed(site, plan))

    def work(self, site: str, plan: BatchPlan, device: torch.device) -> SiteWork | None:
        """The row instructions at a site, ready to run; None where there are none."""
        return plan.memo((self, "work", site), lambda: self._work(site, plan, device))

    def _touched(self, plan: BatchPlan) -> frozenset[str]:
        return frozenset(site for handle in plan.handles for site in self._programs[handle])

    def _placed(self, site: str, plan: BatchPlan) -> tuple[Placed, ...]:
        return tuple(
            Placed(segment, op) for segment in plan.segments for op in self._programs[segment.handle].get(site, ())
        )

    def _work(self, site: str, plan: BatchPlan, device: torch.device) -> SiteWork | None:
        found = [item for item in self.placed(site, plan) if isinstance(item.op, RowInstruction)]
        if not found:
            return None
        phases = {phase: works_of(phase, found, plan, device) for phase in Phase}
        return SiteWork(phases[Phase.INPUT], phases[Phase.MAP], phases[Phase.ADD])


def works_of(phase: Phase, found: Iterable[Placed], plan: BatchPlan, device: torch.device) -> tuple[Work, ...]:
    """The row instructions of a phase: one Work for each kind, more where rows are in several segments."""
    layers: list[tuple[type[RowInstruction], list[Placed]]] = []
    for item in found:
        kind = type(item.op)
        if not issubclass(kind, RowInstruction) or kind.phase is not phase:
            continue
        layer = next((have for k, have in layers if k is kind and have[-1].segment.stop <= item.segment.start), None)
        if layer is None:
            layers.append((kind, [item]))
        else:
            layer.append(item)
    return tuple(_make(kind, items, plan, device) for kind, items in layers)


def _make(kind: type[RowInstruction], items: Sequence[Placed], plan: BatchPlan, device: torch.device) -> Work:
    segments = [item.segment for item in items]
    ops = tuple(item.op for item in items if isinstance(item.op, RowInstruction))
    lengths = tuple(segment.length for segment in segments)
    return Work(kind, ops, lengths, _rows(segments, plan, device), _scale(segments, plan, device))


def _rows(segments: Sequence[Segment], plan: BatchPlan, device: torch.device) -> slice | Tensor:
    """Indices are made and uploaded once for all sites of a plan that have instructions in the same segments."""
    if all(one.stop == two.start for one, two in itertools.pairwise(segments)):
        return slice(segments[0].start, segments[-1].stop)
    spans = tuple((s.start, s.stop) for s in segments)
    return plan.memo(
        ("instruction rows", device, spans), lambda: _upload(torch.cat([torch.arange(*span) for span in spans]), device)
    )


def _scale(segments: Sequence[Segment], plan: BatchPlan, device: torch.device) -> float | Tensor | None:
    scales = {segment.scale for segment in segments}
    if len(scales) == 1:
        scale = scales.pop()
        return None if scale == 1 else scale
    factors = tuple((s.length, s.scale) for s in segments)
    return plan.memo(
        ("instruction scales", device, factors),
        lambda: _upload(torch.cat([torch.full((length, 1), scale) for length, scale in factors]), device),
    )


def _upload(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _take(source: Tensor, rows: slice | Tensor) -> Tensor:
    return source[rows] if isinstance(rows, slice) else source.index_select(0, rows)


def added(target: Tensor, works: Sequence[Work], source: Tensor) -> Tensor:
    """The target with what the works make of the source, in place. All deltas are taken before the first is added:
    source may be the target."""
    deltas = [work.delta(source) for work in works]
    for work, delta in zip(works, deltas, strict=True):
        _add(target, work, delta)
    return target


def _add(target: Tensor, work: Work, delta: Tensor) -> None:
    """One rounding: the sum is made in the delta's type, float32 or wider."""
    rows = _take(target, work.rows)
    total = (rows + delta).to(target.dtype)
    if isinstance(work.rows, slice):
        target[work.rows] = total
    else:
        target.index_copy_(0, work.rows, total)
