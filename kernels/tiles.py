"""Tiles: a plan's segments cut into row blocks, the unit of work of the Triton kernels.

Cut on the host, so that no segment is padded to the longest and no program searches for its rows. Tiles are ordered
by layer: those of one layer cover a row at most once, so a launch over a layer cannot race on y. Each segment row
has its own packed row in xa, hence all layers shrink in one launch.

A tile of a few rows shrinks in parts, one for each ``RANK_BLOCK`` of its own program's rank: were it one for each of
the widest program's, most of a mixed batch's would be launched to find that there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables

# row, packed row, rows, program's table row, scale (the bits of a float32), rank (of a part: its first), 2 unused
TILE_FIELDS = 8
FEW_ROWS = 4  # of a tile that is computed row by row
RANK_BLOCK = 16  # of a part of a shrink
ROWS_BY_BLOCK = {FEW_ROWS: 1, 16: 5, 32: 17, 64: 65}  # a segment length for each answer of block_rows

TileRow = tuple[int, int, int, int, float, int]


Encoded = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a captured graph has room for: tiles and ranks."""

    max_tiles: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """data: [n_tiles, TILE_FIELDS] int32 on the device. layers: tile ranges [start, stop) of each layer. shrinks: what
    a shrink launches a program for: parts [n_parts, TILE_FIELDS] where tiles are of a few rows, else the tiles.

    fixed: the bounds of a buffer that other plans are written into between replays (fixed_plan.py); None: of one plan.
    """

    data: Tensor
    shrinks: Tensor
    layers: tuple[tuple[int, int], ...]
    block_m: int
    packed_rows: int
    fixed: Bounds | None = None
    by_layer: tuple[tuple[Tensor, Tensor], ...] = field(init=False)  # its tiles, and they as float32: their scales

    def __post_init__(self) -> None:
        parts = [self.data[start:stop] for start, stop in self.layers]
        object.__setattr__(self, "by_layer", tuple((part, part.view(torch.float32)) for part in parts))


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
            rows.extend(blocks(segment, packed, tables, block_m))
            packed += segment.length
        layers.append((first, len(rows)))
    tiles = encode(rows)
    parts = parts_of(tiles) if block_m == FEW_ROWS else tiles[:0]
    data = upload(np.concatenate((tiles, parts)), tables.buffer.device)
    shrinks = data[len(tiles) :] if block_m == FEW_ROWS else data
    return Tiles(data[: len(tiles)], shrinks, tuple(layers), block_m, packed)


def blocks(segment: Segment, packed: int, tables: ProgramTables, block_m: int) -> list[TileRow]:
    """The segment's tiles; its first row has the packed row ``packed``."""
    program, rank = tables.row(segment.handle), tables.rank(segment.handle)
    return [
        (segment.start + at, packed + at, min(block_m, segment.length - at), program, segment.scale, rank)
        for at in range(0, segment.length, block_m)
    ]


def encode(rows: Sequence[TileRow]) -> Encoded:
    """[rows, TILE_FIELDS] int32."""
    data = np.zeros((len(rows), TILE_FIELDS), dtype=np.int32)
    if rows:
        data[:, [0, 1, 2, 3, 5]] = [(*row[:4], row[5]) for row in rows]
        data.view(np.float32)[:, 4] = [row[4] for row in rows]
    return data


def parts_of(tiles: Encoded) -> Encoded:
    """[parts, TILE_FIELDS] int32: every tile as many times as its rank has blocks."""
    counts = -(-tiles[:, 5] // RANK_BLOCK)
    parts = np.repeat(tiles, counts, axis=0)
    parts[:, 5] = RANK_BLOCK * (np.arange(len(parts)) - np.repeat(np.cumsum(counts) - counts, counts))
    return parts


def num_parts(plan: BatchPlan, tables: ProgramTables) -> int:
    """How many parts the plan has where its tiles are of a few rows."""
    return plan.memo((tables, "parts"), lambda: sum(_parts_in(segment, tables) for segment in plan.segments))


def _parts_in(segment: Segment, tables: ProgramTables) -> int:
    return -(-segment.length // FEW_ROWS) * -(-tables.rank(segment.handle) // RANK_BLOCK)


def upload(host: Encoded, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(host)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
