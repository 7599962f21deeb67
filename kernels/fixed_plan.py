"""One plan object that stands for many: its tiles live in a device buffer that is rewritten between launches.

A CUDA graph freezes grids, pointers and sizes. Kernels that were captured over ``FixedPlan.plan`` have a grid for as
many tiles as the buffer holds, and read what they do from it; tiles without rows return at once. Whatever would need
more than was captured raises before the buffer is touched: a segment can never be skipped in silence.
"""

from __future__ import annotations

import numpy as np
import torch

from onebase.kernels.plan import BatchPlan
from onebase.kernels.sizes import next_power_of_2
from onebase.kernels.tables import ProgramTables
from onebase.kernels.tiles import (
    FEW_ROWS,
    RANK_BLOCK,
    TILE_FIELDS,
    Bounds,
    Encoded,
    TileRow,
    Tiles,
    blocks,
    encode,
    parts_of,
)
from onebase.kernels.touched import Touched


class DoesNotFit(ValueError):
    """A batch needs more than was captured; or what was captured reads what is no longer there."""


class FixedPlan:
    """``plan`` goes to the kernels and to whoever captures them; ``fill`` says what they do from then on."""

    def __init__(
        self,
        tables: ProgramTables,
        num_rows: int,
        *,
        max_tiles: int,
        max_rank: int,
        num_layers: int = 1,
        max_parts: int | None = None,
        sites: Touched | None = None,
    ) -> None:
        """max_tiles: per layer, for segments of up to FEW_ROWS rows one each; num_layers: adapters that a row may have;
        max_parts: of all tiles together, see tiles.num_parts; None for as many as there can be. A shrink launches so
        many, whatever the plan. sites: those that kernels are launched for, None for expands at all."""
        self.plan = BatchPlan(num_rows)
        self._tables = tables
        self._bounds = Bounds(max_tiles, max_rank)
        self._num_layers = num_layers
        self._sites = Touched(frozenset(range(len(tables.sites)))) if sites is None else sites
        self._table, self._alignment = tables.device_table, tables.alignment
        self._filled: BatchPlan | None = None
        device = tables.buffer.device
        count = num_layers * max_tiles
        most = count * -(-max_rank // RANK_BLOCK)
        self._max_parts = most if max_parts is None else min(max_parts, most)
        self._data = torch.zeros((count + self._max_parts, TILE_FIELDS), dtype=torch.int32, device=device)
        layers = tuple((at * max_tiles, (at + 1) * max_tiles) for at in range(num_layers))
        tiles = Tiles(self._data[:count], self._data[count:], layers, FEW_ROWS, num_layers * num_rows, self._bounds)
        self.plan.memo((tables, "tiles"), lambda: tiles)
        tables.touch(self.plan, self._sites)

    @property
    def is_stale(self) -> bool:
        """Whether the table of programs has moved, or programs lie where the captured kernels cannot read them."""
        return self._tables.device_table is not self._table or self._tables.alignment != self._alignment

    def fill(self, plan: BatchPlan) -> None:
        """From the next launch or replay on, do what ``plan`` says; rows beyond its own are base rows.

        Raises DoesNotFit where it needs more than was captured, KeyError for a program that is not installed. Costs
        nothing where the plan is the one of the last time.
        """
        self._tables.check(plan)
        if self.is_stale:
            raise DoesNotFit("fixed plan: the table of programs has moved since the capture")
        if plan is self._filled:
            return
        self._fits("rows", plan.num_rows, self.plan.num_rows)
        self._fits("adapters on one row", len(plan.layers), self._num_layers)
        self._fits("the largest rank", self._tables.largest_rank(plan), self._bounds.max_rank)
        touched = self._tables.touched(plan)
        self._fits("sites beyond those captured", len(touched.outputs - self._sites.outputs), 0)
        self._fits("scaled inputs beyond those captured", len(touched.inputs - self._sites.inputs), 0)
        if len(plan.layers) > 1:  # the second would read what the first has written
            self._fits("maps beside other adapters on a row", len(touched.maps), 0)
        host = torch.from_numpy(self._encoded(encode(self._cut(plan))))
        pinned = host.pin_memory() if self._data.is_cuda else host
        self._data.copy_(pinned, non_blocking=True)
        self._filled = plan

    def _cut(self, plan: BatchPlan) -> list[TileRow]:
        """Each layer's tiles at the layer's place in the buffer."""
        rows: list[TileRow] = []
        packed = 0
        for number, layer in enumerate(plan.layers):
            rows += [_EMPTY] * (number * self._bounds.max_tiles - len(rows))
            first = len(rows)
            for segment in layer:
                rows += blocks(segment, packed, self._tables, FEW_ROWS)
                packed += segment.length
            self._fits("tiles", len(rows) - first, self._bounds.max_tiles)
        return rows

    def _encoded(self, tiles: Encoded) -> Encoded:
        """The whole buffer; what is beyond the tiles and beyond their parts is zeros, which are of no rows."""
        data = np.zeros(self._data.shape, dtype=np.int32)
        data[: len(tiles)] = tiles
        parts = parts_of(tiles)
        self._fits("parts of ranks", len(parts), self._max_parts)
        start = self._num_layers * self._bounds.max_tiles
        data[start : start + len(parts)] = parts
        return data

    def _fits(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise DoesNotFit(f"fixed plan: {what}: the batch has {count}, captured were {most}")


def class_of(count: int) -> int:
    """What a bound is rounded up to, so that few graphs do for many plans: powers of two from 16 on, 0 for nothing."""
    return count and max(16, next_power_of_2(count))


_EMPTY: TileRow = (0, 0, 0, 0, 0.0, 0)
