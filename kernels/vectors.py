"""The vectors of the tables in plain torch: gains and pair rotations of a site's output, gains of its input.

What the CPU and reference bodies do, and Triton where an expand does not find what the base gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from onebase.kernels.instructions import Placed, Work, added, works_of
from onebase.kernels.ops.instruction import Phase
from onebase.kernels.ops.rotate import PairRotateOut
from onebase.kernels.ops.vector import ScaleIn, ScaleOut
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables


class Vectors:
    """Frequent programs are batched: the same work as of row instructions, found in the tables."""

    def __init__(self, tables: ProgramTables) -> None:
        self._tables = tables

    def map_outputs(
        self, ys: Sequence[Tensor], sites: Sequence[int], plan: BatchPlan, origins: Mapping[int, Tensor]
    ) -> None:
        """y[row] += segment.scale * map(origin[row]), in place, at each site; without an origin y is its own."""
        mapped = self._tables.touched(plan).maps
        if mapped:
            for y, site in zip(ys, sites, strict=True):
                if site in mapped:
                    added(y, self._works(Phase.MAP, site, plan), origins.get(site, y))

    def scale_in(self, target: Tensor, x: Tensor, site: int, plan: BatchPlan) -> None:
        """target[row] += segment.scale * gain_in * x[row], in place."""
        if site in self._tables.touched(plan).inputs:
            added(target, self._works(Phase.INPUT, site, plan), x)

    def _works(self, phase: Phase, site: int, plan: BatchPlan) -> tuple[Work, ...]:
        return plan.memo((self, phase, site), lambda: self._make(phase, site, plan))

    def _make(self, phase: Phase, site: int, plan: BatchPlan) -> tuple[Work, ...]:
        view = input_gain if phase is Phase.INPUT else output_map
        found = [(use.segment, view(self._tables, site, use.op)) for use in self._tables.uses(site, plan)]
        placed = [Placed(segment, op) for segment, op in found if op is not None]
        return works_of(phase, placed, plan, self._tables.buffer.device)


def output_map(tables: ProgramTables, site: int, op: Operands) -> ScaleOut | PairRotateOut | None:
    """What the program makes of the base's output, over views of the buffer."""
    width = tables.sites[site].out_features
    if op.gain < 0:
        return None
    gain = tables.vector(op.gain, width)
    return ScaleOut(gain) if op.sine < 0 else PairRotateOut(gain, tables.vector(op.sine, width), op.group)


def input_gain(tables: ProgramTables, site: int, op: Operands) -> ScaleIn | None:
    """How the program scales the base's input, over a view of the buffer."""
    return None if op.gain_in < 0 else ScaleIn(tables.vector(op.gain_in, tables.sites[site].in_features))
