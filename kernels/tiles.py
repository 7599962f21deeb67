"""Tiles: a plan's segments cut into row blocks, the unit of work of the Triton kernels.

Cut on the host, so that no segment is padded to the longest and no program searches for its rows. Tiles are ordered
by layer: those of one layer cover a row at most once, so a launch over a layer cannot race on y. Each segment row
has its own packed row in xa, hence all layers shrink in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables

TILE_FIELDS = 8  # row, packed row, rows, program's table row, scale (the bits of a float32), 3 unused: 32-byte rows
ROWS_BY_BLOCK = (16, 17, 65)  # a segment length for each answer of block_rows


@dataclass(frozen=True, slots=True)
class Tiles:
    """data: [n_tiles, TILE_FIELDS] int32 on the device. layers: tile ranges [start, stop) of each layer."""

    data: Tensor
    layers: tuple[tuple[int, int], ...]
    block_m: int
    packed_rows: int

    @property
    def count(self) -> int:
        return self.data.shape[0]


def tiles_of(plan: BatchPlan, tables: ProgramTables) -> Tiles:
    """The plan's tiles on the tables' device, made and uploaded once."""
    tables.check(plan)
    return plan.memo((tables, "tiles"), lambda: _cut(plan, tables))


def block_rows(plan: BatchPlan) -> int:
    """Rows of a tile. Decode: 16, the least that tensor cores take. Prefill: more, to read weights less often."""
    longest = max((segment.length for segment in plan.segments), default=0)
    return 16 if longest <= 16 else 32 if longest <= 64 else 64


def _cut(plan: BatchPlan, tables: ProgramTables) -> Tiles:
    block_m, packed = block_rows(plan), 0
    rows: list[tuple[int, int, int, int, float]] = []
    layers: list[tuple[int, int]] = []
    for layer in plan.layers:
        first = len(rows)
        for segment in layer:
            rows.extend(_blocks(segment, packed, tables.row(segment.handle), block_m))
            packed += segment.length
        layers.append((first, len(rows)))
    return Tiles(_upload(rows, tables.buffer.device), tuple(layers), block_m, packed)


def _blocks(segment: Segment, packed: int, program: int, block_m: int) -> list[tuple[int, int, int, int, float]]:
    return [
        (segment.start + at, packed + at, min(block_m, segment.length - at), program, segment.scale)
        for at in range(0, segment.length, block_m)
    ]


def _upload(rows: list[tuple[int, int, int, int, float]], device: torch.device) -> Tensor:
    data = np.zeros((len(rows), TILE_FIELDS), dtype=np.int32)
    if rows:
        data[:, :4] = [row[:4] for row in rows]
        data.view(np.float32)[:, 4] = [row[4] for row in rows]
    host = torch.from_numpy(data)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
