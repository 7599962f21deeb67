"""Which way each segment of a plan goes on the CPU: by gathers, by a masked product, or by itself.

Gathers read each row's own factors, once per row. A masked product multiplies all rows with all their programs'
columns and clears what does not belong together: few calls, wasted arithmetic. A segment by itself wastes nothing but
pays for its calls. The split gives the shortest segments, up to some length, to one of the first two, and leaves the
others to themselves, as the estimated time is least. Every way gives the same sums but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.packs import PANEL_PROGRAMS
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables


@dataclass(frozen=True, slots=True)
class Ways:
    """The segments that share gathers and those that share masked products; the others go one by one."""

    gathered: tuple[Segment, ...] = ()
    masked: tuple[Segment, ...] = ()


class CpuSplit:
    """Estimates a site of average size."""

    def __init__(self, tables: ProgramTables, tuning: CpuTuning) -> None:
        self._tables = tables
        self._costs = tuning
        widths = [site.in_features + site.out_features for site in tables.sites]
        self._width = sum(widths) / max(1, len(widths))
        self._ranks: dict[int, int] = {}

    def ways(self, plan: BatchPlan) -> Ways:
        ordered = sorted(plan.segments, key=lambda segment: segment.length)
        alone = [self._alone(segment) for segment in ordered]
        best, choice = sum(alone), Ways()
        for name, together in (("gathered", self._gathered(ordered)), ("masked", self._masked(ordered))):
            rest = sum(alone)
            for count, cost in enumerate(together, start=1):
                rest -= alone[count - 1]
                if rest + cost < best:
                    best, choice = rest + cost, Ways(**{name: tuple(ordered[:count])})
        return choice

    def rank(self, handle: int) -> int:
        """The largest rank that the program has at a linear site."""
        if handle not in self._ranks:
            ops = self._tables.operands(handle).values()
            self._ranks[handle] = max((op.rank for op in ops if not op.token), default=0)
        return self._ranks[handle]

    def forget(self, handle: int) -> None:
        self._ranks.pop(handle, None)

    def _alone(self, segment: Segment) -> float:
        return 2 * self._costs.call + self._product(segment.length, self.rank(segment.handle), self._costs.per_mac)

    def _gathered(self, ordered: list[Segment]) -> Iterator[float]:
        """The cost of the first one, two, three ... segments by gathers."""
        samples = 0
        for segment in ordered:
            samples += segment.length * self.rank(segment.handle)
            yield 2 * self._costs.gather + samples * self._width * self._costs.per_gathered

    def _masked(self, ordered: list[Segment]) -> Iterator[float]:
        """As _gathered. One program alone has nobody to share a product with."""
        rows, handles, columns = 0, set[int](), 0
        for segment in ordered:
            rows += segment.length
            if segment.handle not in handles:
                handles.add(segment.handle)
                columns += self.rank(segment.handle)
            panels = -(-len(handles) // PANEL_PROGRAMS)
            yield self._panels(rows, columns, panels) if len(handles) > 1 else math.inf

    def _panels(self, rows: int, columns: int, panels: int) -> float:
        calls = panels * (2 * self._costs.call + self._costs.mask)
        return calls + panels * self._product(-(-rows // panels), -(-columns // panels), self._costs.per_wide_mac)

    def _product(self, rows: int, columns: int, per_mac: float) -> float:
        weight = columns * self._width
        size = self._tables.buffer.element_size()
        return weight * (rows * per_mac + size * self._costs.per_byte)
