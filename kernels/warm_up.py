"""Programs and plans without content, for launches that only compile."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from onebase.kernels.config import Shape
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape
from onebase.kernels.tiles import ROWS_BY_BLOCK


def zero_programs(zeros: Tensor, sites: Sequence[SiteShape], rank: int, count: int, token: bool) -> ProgramTables:
    """``count`` programs of one rank at every site whose factors fit into ``zeros``, which they all share."""
    tables = ProgramTables(zeros, sites)
    fits = [rank * max(site.in_features, site.out_features) <= zeros.numel() for site in sites]
    vector = -1 if token else 0
    zero = Operands(rank, 1.0, 0, 0, token=token, gain=vector, gain_in=vector)
    operands = {site: zero for site, here in enumerate(fits) if here}
    for handle in range(count):
        tables.install(handle, operands)
    return tables


def warm_plan(shape: Shape) -> BatchPlan:
    """A plan in the shape's classes of rows, tile height and distinct programs; what is left over are base rows."""
    longest = ROWS_BY_BLOCK[shape.block_m]
    runs = [(longest if handle == 0 else 1, ((handle, 1.0),)) for handle in range(shape.distinct)]
    return BatchPlan.from_runs([*runs, (max(0, shape.rows - longest - shape.distinct + 1), ())])
