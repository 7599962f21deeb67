"""Which block shapes the Triton kernels run with: a tuned table of the device, else a heuristic. No trials here.

The heuristic:
- tiles of a few rows (decoding): blocks of a factor of 16 by 512 bytes, whatever the rank. A shrink has 8 warps for
  one, an expand a single one: sums across warps cost more than the reading (measured on an H200). Beyond rank 64 an
  expand has 3 blocks on their way at once: its widest programs would end last, waiting for one block after the other;
- else rank blocks are the largest rank's power of two, from 16 to 128 bytes' worth. Shrink: BLOCK_K 256 bytes for tiles
  of 16 rows, 128 for taller ones; expand: BLOCK_N 64 for tiles of 16 rows (more programs in flight), 128 for others;
- K is split into parts of at least 512 over the grid, 8 at most and 4 for tall tiles, because a few tiles alone leave
  most of the device idle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from onebase.kernels.sizes import next_power_of_2
from onebase.kernels.tables import PAIR_BLOCK
from onebase.kernels.tiles import FEW_ROWS, RANK_BLOCK

TABLES = Path(__file__).parent / "tuned"
_SPLIT_SIZE, _MOST_SPLITS, _TALL_SPLITS = 512, 8, 4
_FEW_BYTES = 512  # of a factor's row that a program reads at once
_ONE_BY_ONE = 64  # the largest rank that an expand of a few rows reads block by block
_LARGEST_CLASS = 4096

T = TypeVar("T")
Op = Literal["shrink", "expand", "token"]


@dataclass(frozen=True, slots=True)
class Shape:
    """All that shapes a launch. Batch geometry comes in classes: powers of two, rounded up.

    slices: output widths, of every site of a shrink's group, or of the one site. rank: of the widest program.
    block_m: rows of a tile. rows, distinct: of the batch, and its programs. Not in it: an expand's SPLITS, as many as
    the xa that it reads has. The heuristic's follow from h_in and block_m; beside a tuned shrink any block is right.
    """

    op: Op
    dtype: str
    h_in: int
    slices: tuple[int, ...]
    rank: int
    block_m: int
    rows: int
    distinct: int

    @classmethod
    def of(
        cls, op: Op, dtype: torch.dtype, h_in: int, slices: tuple[int, ...], *, rank: int, block_m: int, rows: int,
        distinct: int,
    ) -> Shape:  # fmt: skip
        name = str(dtype).removeprefix("torch.")
        return cls(op, name, h_in, slices, rank_class(rank), block_m, size_class(rows), size_class(distinct))

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True, slots=True)
class Config:
    """block: BLOCK_K of a shrink, BLOCK_N of an expand. splits: parts of K; 1 for an expand."""

    block_r: int
    block: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


class Configs:
    """The configuration of any shape. ``tuned`` goes before the heuristic."""

    def __init__(self, tuned: Mapping[Shape, Config] = {}) -> None:
        """Raises ValueError where an expand's block would part the pairs of a rotation, where parts of K are not a
        power of two, and where a shrink of a few rows is not to take the parts that tiles are cut into."""
        for shape, config in tuned.items():
            if config.splits & (config.splits - 1):
                raise ValueError(f"splits: {config.splits} of {shape}: allowed are powers of two")
            if shape.op == "expand" and config.block % PAIR_BLOCK:
                raise ValueError(
                    f"block: {config.block} of {shape}: allowed for an expand are multiples of {PAIR_BLOCK}"
                )
            if (shape.op, shape.block_m) == ("shrink", FEW_ROWS) and config.block_r != RANK_BLOCK:
                raise ValueError(f"block_r: {config.block_r} of {shape}: allowed for a few rows is {RANK_BLOCK}")
        self.tuned = tuned

    def get(self, shape: Shape) -> Config:
        return self.tuned.get(shape) or heuristic(shape)

    @classmethod
    def of_device(cls, device: torch.device) -> Configs:
        """With the table shipped for it, if there is one. Raises ValueError for a table that is not well formed."""
        if device.type != "cuda":
            return cls()
        return cls(load(TABLES / file_name(torch.cuda.get_device_name(device))))


def heuristic(shape: Shape) -> Config:
    if shape.block_m == FEW_ROWS:
        if shape.op == "shrink":
            return Config(RANK_BLOCK, _FEW_BYTES // shape.itemsize, _splits(shape), num_warps=8)
        return Config(16, _FEW_BYTES // shape.itemsize, num_warps=1, num_stages=3 if shape.rank > _ONE_BY_ONE else 1)
    flat, block_r = shape.block_m == 16, max(16, min(128 // shape.itemsize, shape.rank))
    if shape.op != "shrink":
        return Config(block_r, 64 if flat else 128)
    return Config(block_r, (256 if flat else 128) // shape.itemsize, _splits(shape))


def _splits(shape: Shape) -> int:
    """Parts of K of a shrink: a power of two, and not by what changes with the batch: each is a kernel of its own."""
    if shape.op != "shrink":
        return 1
    most = max(1, min(_MOST_SPLITS if shape.block_m <= 16 else _TALL_SPLITS, shape.h_in // _SPLIT_SIZE))
    return int(1 << (most.bit_length() - 1))


def rank_class(rank: int) -> int:
    """The power of two from 16 up to 512 that holds the rank."""
    return max(16, min(512, size_class(rank)))


def size_class(count: int) -> int:
    return min(_LARGEST_CLASS, next_power_of_2(max(1, count)))


def file_name(device_name: str) -> str:
    """NVIDIA H200 -> nvidia_h200.json"""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


@cache
def load(path: Path) -> Mapping[Shape, Config]:
    """A table's entries; none where there is no such file."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())["entries"]
    return {_shape(path, entry): _made(path, Config, entry.get("config", {})) for entry in entries}


def dump(path: Path, device_name: str, tuned: Mapping[Shape, Config]) -> None:
    """Write a table that ``load`` reads back."""
    entries = [{**asdict(shape), "config": asdict(config)} for shape, config in tuned.items()]
    path.write_text(json.dumps({"device": device_name, "entries": entries}, indent=1) + "\n")


def _shape(path: Path, entry: Mapping[str, Any]) -> Shape:
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items() if name != "config"}
    return _made(path, Shape, given)


def _made(path: Path, kind: type[T], given: Mapping[str, Any]) -> T:
    """Every field must be there, and no other: a key that lacks one would stand for kernels that differ."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if wrong := names ^ given.keys():
        raise ValueError(f"{path.name}: {', '.join(sorted(wrong))}: each entry has exactly {', '.join(sorted(names))}")
    return kind(**given)
