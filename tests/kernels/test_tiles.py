"""Tiles, and the parts that a shrink of a few rows is launched in: each rank of each program once, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape
from onebase.kernels.tiles import FEW_ROWS, RANK_BLOCK, tiles_of

SITES = (SiteShape(8, 8), SiteShape(8, 8))


def _tables(ranks: Sequence[tuple[int, int]]) -> ProgramTables:
    """Programs by their ranks at both sites."""
    tables = ProgramTables(torch.zeros(8 * 256), SITES)
    for handle, both in enumerate(ranks):
        tables.install(handle, {site: Operands(rank, 1.0, 0, 0) for site, rank in enumerate(both)})
    return tables


def test_a_shrink_has_a_program_for_each_block_of_a_tiles_own_rank() -> None:
    ranks = [(8, 8), (128, 0), (16, 17), (0, 0), (77, 1)]
    tables = _tables(ranks)
    runs = [(length, ((handle, 0.5),)) for handle, length in enumerate((1, 2, FEW_ROWS, 1, 1))]
    tiles = tiles_of(BatchPlan.from_runs(runs), tables)
    told = [tuple(part) for part in tiles.shrinks[:, [0, 1, 2, 3, 5]].tolist()]
    wanted, row = [], 0
    for handle, (length, _) in enumerate(runs):
        blocks = range(0, max(ranks[handle]), RANK_BLOCK)
        wanted += [(row, row, length, tables.row(handle), first) for first in blocks]
        row += length
    assert told == wanted
    assert len(told) == 1 + 8 + 2 + 0 + 5, "not five times the widest program's eight"
    assert set(tiles.shrinks.view(torch.float32)[:, 4].tolist()) == {0.5}
    assert len(tiles.data) == len(runs)


def test_tall_tiles_shrink_whole() -> None:
    tiles = tiles_of(BatchPlan.from_runs([(FEW_ROWS + 1, ((0, 1.0),))]), _tables([(64, 64)]))
    assert tiles.shrinks is tiles.data or torch.equal(tiles.shrinks, tiles.data)
    assert tiles.block_m == 16


@pytest.mark.parametrize("ranks", [[(0, 0)], []])
def test_without_ranks_there_is_nothing_to_shrink(ranks: list[tuple[int, int]]) -> None:
    runs = [(1, ((0, 1.0),))] if ranks else [(3, ())]
    assert len(tiles_of(BatchPlan.from_runs(runs), _tables(ranks)).shrinks) == 0
