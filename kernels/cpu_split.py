"""Which segments of a plan share a masked product on the CPU, and which go one by one.

A masked product multiplies all short segments' rows with all their programs' columns and clears what does not belong
together: few calls, wasted arithmetic. A segment on its own wastes nothing but pays for its calls. The split takes
the shortest segments up to the length where the estimated time is least.
"""

from __future__ import annotations

from dataclasses import dataclass

from onebase.kernels.packs import PANEL_PROGRAMS
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables


@dataclass(frozen=True, slots=True)
class CpuTuning:
    """Estimates in microseconds, measured on two Zen 4 cores in bf16; only their ratios matter.

    call: one product, whatever its size. mask: scaling and clearing xa. per_mac: a multiply-add.
    per_byte: a weight byte read. prepack_after: steps that a pack has to stand before it is prepacked; prepacking costs
    what about as many steps save.
    """

    call: float = 30.0
    mask: float = 15.0
    per_mac: float = 1 / 130e3
    per_byte: float = 1 / 16e3
    prepack_after: int = 8


class CpuSplit:
    """Estimates a site of average size."""

    def __init__(self, tables: ProgramTables, tuning: CpuTuning) -> None:
        self._tables = tables
        self._costs = tuning
        widths = [site.in_features + site.out_features for site in tables.sites]
        self._width = sum(widths) / max(1, len(widths))
        self._ranks: dict[int, int] = {}

    def masked(self, plan: BatchPlan) -> frozenset[Segment]:
        """The segments that share masked products; the others go one by one."""
        ordered = sorted(plan.segments, key=lambda segment: segment.length)
        alone = [self._alone(segment) for segment in ordered]
        rest, rows, handles, columns = sum(alone), 0, set[int](), 0
        best, best_count = rest, 0
        for count, segment in enumerate(ordered, start=1):
            rest -= alone[count - 1]
            rows += segment.length
            if segment.handle not in handles:
                handles.add(segment.handle)
                columns += self._rank(segment.handle)
            cost = rest + self._together(rows, columns, len(handles))
            if cost < best:
                best, best_count = cost, count
        return frozenset(ordered[:best_count])

    def forget(self, handle: int) -> None:
        self._ranks.pop(handle, None)

    def _alone(self, segment: Segment) -> float:
        return 2 * self._costs.call + self._product(segment.length, self._rank(segment.handle))

    def _together(self, rows: int, columns: int, programs: int) -> float:
        panels = -(-programs // PANEL_PROGRAMS)
        calls = panels * (2 * self._costs.call + self._costs.mask)
        return calls + panels * self._product(-(-rows // panels), -(-columns // panels))

    def _product(self, rows: int, columns: int) -> float:
        weight = columns * self._width
        size = self._tables.buffer.element_size()
        return weight * (rows * self._costs.per_mac + size * self._costs.per_byte)

    def _rank(self, handle: int) -> int:
        if handle not in self._ranks:
            ops = self._tables.operands(handle).values()
            self._ranks[handle] = max((op.rank for op in ops if not op.token), default=0)
        return self._ranks[handle]
