"""Tiles: a plan's segments cut into row blocks, the unit of work of the Triton kernels.

Cut on the host, so that no segment is padded to the longest and no program searches for its rows. Tiles are ordered
by layer: those of one layer cover a row at most once, so a launch over a layer cannot race on y. Each segment row
has its own packed row in xa, hence all layers shrink in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables

TILE_FIELDS = 8  # row, packed row, rows, program's table row, scale (the bits of a float32), 3 unused: 32-byte rows
FEW_ROWS = 4  # of a tile that is computed row by row
ROWS_BY_BLOCK = {FEW_ROWS: 1, 16: 5, 32: 17, 64: 65}  # a segment length for each answer of block_rows

TileRow = tuple[int, int, int, int, float]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a captured graph has room for: tiles and ranks."""

    max_tiles: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """data: [n_tiles, TILE_FIELDS] int32 on the device. layers: tile ranges [start, stop) of each layer.

    fixed: the bounds of a buffer that other plans are written into between replays (fixed_plan.py); None: of one plan.
    """

    data: Tensor
    layers: tuple[tuple[int, int], ...]
    block_m: int
    packed_rows: int
    fixed: Bounds | None = None

    @property
    def count(self) -> int:
        return self.data.shape[0]


def tiles_of(plan: BatchPlan, tables: ProgramTables) -> Tiles:
    """The plan's tiles on the tables' device, made and uploaded once."""
    tables.check(plan)
    return plan.memo((tables, "tiles"), lambda: _cut(plan, tables))


def block_rows(plan: BatchPlan) -> int:
    """Rows of a tile. A few where all segments are short (decoding), else 16, the least that tensor cores take, and for
    long segments more, to read weights less often."""
    longest = max((segment.length for segment in plan.segments), default=0)
    return FEW_ROWS if longest <= FEW_ROWS else 16 if longest <= 16 else 32 if longest <= 64 else 64


def _cut(plan: BatchPlan, tables: ProgramTables) -> Tiles:
    block_m, packed = block_rows(plan), 0
    rows: list[TileRow] = []
    layers: list[tuple[int, int]] = []
    for layer in plan.layers:
        first = len(rows)
        for segment in layer:
            rows.extend(blocks(segment, packed, tables.row(segment.handle), block_m))
            packed += segment.length
        layers.append((first, len(rows)))
    return Tiles(upload(encode(rows, len(rows)), tables.buffer.device), tuple(layers), block_m, packed)


def blocks(segment: Segment, packed: int, program: int, block_m: int) -> list[TileRow]:
    return [
        (segment.start + at, packed + at, min(block_m, segment.length - at), program, segment.scale)
        for at in range(0, segment.length, block_m)
    ]


def encode(rows: Sequence[TileRow], count: int) -> Tensor:
    """[count, TILE_FIELDS] int32 on the host; what is beyond the rows is zeros: tiles without rows."""
    data = np.zeros((count, TILE_FIELDS), dtype=np.int32)
    if rows:
        data[: len(rows), :4] = [row[:4] for row in rows]
        data.view(np.float32)[: len(rows), 4] = [row[4] for row in rows]
    return torch.from_numpy(data)


def upload(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
