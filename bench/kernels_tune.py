"""Makes a table of configurations for the device at hand, for the Triton kernels to read at start.

For every site group, rank, number of rows and of adapters, each field of the configuration is varied in turn from the
heuristic's, twice over; what is at least 3 % faster than the heuristic becomes an entry.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase.bench.kernels_case import aligned
from onebase.bench.kernels_clock import medians
from onebase.bench.kernels_sides import Side
from onebase.bench.report import show
from onebase.kernels.config import Config, Configs, Op, Shape, dump, file_name, heuristic
from onebase.kernels.matmul_triton import TritonKernels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape
from onebase.kernels.tiles import FEW_ROWS, RANK_BLOCK

Clock = Callable[[Side], float]
Slices = tuple[int, ...]

# The site groups of the 8B Llama shape: width read, widths given.
GROUPS: tuple[tuple[int, Slices], ...] = (
    (4096, (4096, 1024, 1024)),
    (4096, (4096,)),
    (4096, (14336, 14336)),
    (14336, (4096,)),
)
RANKS = (16, 32, 64, 128)
ROWS = (1, 16, 64, 256, 2048)
_COLD_BYTES = 1 << 29
_WORTH = 0.97  # of the heuristic's time
_ROUNDS = 5
_ROUNDING = 0.02  # of the largest output: sums in another order, rounded to 16 bits
_log = logging.getLogger("onebase.bench")

_BLOCKS = {  # blocks of an expand are multiples of PAIR_BLOCK
    "block_r": (16, 32, 64),
    "block": (64, 128, 256, 512, 1024),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
_SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One group of sites, several times over so that caches stay cold, under programs of one rank."""

    tables: ProgramTables
    groups: tuple[tuple[int, ...], ...]
    x: Tensor
    plan: BatchPlan

    @classmethod
    def of(
        cls, group: tuple[int, Slices], rank: int, rows: int, programs: int, buffer: Tensor, cold_bytes: int
    ) -> Bench:
        """Programs share the buffer's factors from different places: what is read, not what it holds, takes time."""
        h_in, slices = group
        size = programs * rank * sum(h_in + width for width in slices) * buffer.element_size()
        copies = max(1, math.ceil(min(cold_bytes, buffer.nbytes) / size))
        tables = ProgramTables(buffer, [SiteShape(h_in, width) for width in slices] * copies)
        at = 0
        for handle in range(programs):
            operands = {}
            for site, shape in enumerate(tables.sites):
                need = aligned(rank * (shape.in_features + shape.out_features))
                at = at if at + need <= buffer.numel() else 0
                operands[site] = Operands(rank, 1.0, at, at + rank * shape.in_features)
                at += need
            tables.install(handle, operands)
        each, extra = divmod(rows, programs)
        runs = [(each + (handle < extra), ((handle, 1.0),)) for handle in range(programs)]
        groups = tuple(tuple(range(at, at + len(slices))) for at in range(0, len(tables.sites), len(slices)))
        x = torch.empty((rows, h_in), dtype=buffer.dtype, device=buffer.device).normal_()
        return cls(tables, groups, x, BatchPlan.from_runs(runs))

    def shape(self, op: Op) -> Shape:
        """Of a launch over the group."""
        return TritonKernels(self.tables, Configs()).shape(op, self.groups[0], self.plan)

    def shrink(self, configs: Configs) -> Side:
        kernels, plan = TritonKernels(self.tables, configs), _fresh(self.plan)

        def run() -> None:
            for group in self.groups:
                kernels.shrink(self.x, group, plan)

        return run

    def expand(self, configs: Configs) -> Side:
        kernels, plan = TritonKernels(self.tables, configs), _fresh(self.plan)
        shrunk = [kernels.shrink(self.x, group, plan) for group in self.groups]
        ys = [self.x.new_zeros((len(self.x), self.tables.sites[site].out_features)) for site in self.groups[0]]

        def run() -> None:
            for group, one in zip(self.groups, shrunk, strict=True):
                kernels.expand_group(ys, one, group, plan)

        return run

    def outputs(self, configs: Configs) -> list[Tensor]:
        """What the first group adds to zeros."""
        kernels, plan, group = TritonKernels(self.tables, configs), _fresh(self.plan), self.groups[0]
        ys = [self.x.new_zeros((len(self.x), self.tables.sites[site].out_features)) for site in group]
        kernels.expand_group(ys, kernels.shrink(self.x, group, plan), group, plan)
        return ys


def tune(
    device: str,
    folder: Path,
    *,
    groups: Sequence[tuple[int, Slices]] = GROUPS,
    ranks: Sequence[int] = RANKS,
    rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16,
    most_seconds: float = math.inf,
) -> Path:
    """Write the table of this device into the folder; its path. Needs a CUDA device to itself.

    After ``most_seconds`` what was found so far is written."""
    kind = torch.device(device)
    if kind.type != "cuda":
        raise ValueError(f"device: {device}: tables are for the Triton kernels on CUDA")
    name = torch.cuda.get_device_name(kind)
    buffer = torch.empty(_COLD_BYTES // dtype.itemsize, dtype=dtype, device=kind).normal_(std=0.02)
    path = folder / file_name(name)
    with torch.inference_mode():
        stop, found = time.monotonic() + most_seconds, dict[Shape, Config]()
        folder.mkdir(parents=True, exist_ok=True)
        for entries in tuned(buffer, groups, ranks, rows, lambda side: medians({"": side}, kind, _ROUNDS)[""], stop):
            found = entries
            dump(path, name, found)  # so that a run that is cut off leaves what it has found
    show(str(path), {"entries": str(len(found)) if path.exists() else "none was tried in this time"})
    return path


def tuned(
    buffer: Tensor,
    groups: Sequence[tuple[int, Slices]],
    ranks: Sequence[int],
    rows: Sequence[int],
    clock: Clock,
    stop: float = math.inf,
) -> Iterator[dict[Shape, Config]]:
    """The entries that are worth having, after each group of sites, rank, rows and programs that is tried before
    ``stop`` on the monotonic clock."""
    found: dict[Shape, Config] = {}
    for group, rank, count in itertools.product(groups, ranks, rows):
        for programs in sorted({1, max(1, count // 2), count}):
            if programs <= 256 and time.monotonic() < stop:
                _tune(Bench.of(group, rank, count, programs, buffer, _COLD_BYTES), clock, found)
                yield found


def _tune(bench: Bench, clock: Clock, found: dict[Shape, Config]) -> None:
    """The shrink first: an expand sums as many parts as it leaves."""
    for shape, side in ((bench.shape("shrink"), bench.shrink), (bench.shape("expand"), bench.expand)):
        if shape in found:
            continue
        best = search(heuristic(shape), options(shape), _cost(shape, side, clock, found))
        if best is not None and _agrees(bench, Configs(found), Configs({**found, shape: best})):
            found[shape] = best


def _cost(
    shape: Shape, side: Callable[[Configs], Side], clock: Clock, found: Mapping[Shape, Config]
) -> Callable[[Config], float]:
    """Beside what was found before."""

    def cost(config: Config) -> float:
        try:
            return clock(side(Configs({**found, shape: config})))
        except Exception as error:  # more shared memory than there is, or what the compiler cannot do
            _log.info("%s of %s: %s: %s", config, shape, type(error).__name__, error)
            return math.inf

    return cost


def _agrees(bench: Bench, plain: Configs, other: Configs) -> bool:
    """Whether the group's outputs are the same but for rounding."""
    expected, got = bench.outputs(plain), bench.outputs(other)
    for mine, theirs in zip(got, expected, strict=True):
        if not float((mine.float() - theirs.float()).abs().max()) <= _ROUNDING * float(theirs.float().abs().max()):
            _log.warning("a configuration gives other numbers, and is no entry: %s", bench.plan)
            return False
    return True


def options(shape: Shape) -> Mapping[str, Sequence[int]]:
    """What each field may be."""
    if shape.op != "shrink":
        return _BLOCKS
    few = {"block_r": (RANK_BLOCK,), "num_stages": (3,)} if shape.block_m == FEW_ROWS else {}
    return _BLOCKS | {"splits": _SPLITS} | few


def search(start: Config, options: Mapping[str, Sequence[int]], cost: Callable[[Config], float]) -> Config | None:
    """The cheapest that varying one field after the other finds from ``start``; None where it is hardly cheaper."""
    costs = {start: cost(start)}
    best = start
    for _ in range(2):
        for field, values in options.items():
            for config in _variants(best, field, values):
                if config not in costs:
                    costs[config] = cost(config)
            best = min(costs, key=lambda config: costs[config])
    return best if costs[best] < _WORTH * costs[start] else None


def _variants(config: Config, field: str, values: Sequence[int]) -> Iterator[Config]:
    for value in values:
        changes: dict[str, Any] = {field: value}
        yield replace(config, **changes)


def _fresh(plan: BatchPlan) -> BatchPlan:
    """Without what was derived from it: a plan remembers the configuration of its launches."""
    return BatchPlan(plan.num_rows, plan.segments)
