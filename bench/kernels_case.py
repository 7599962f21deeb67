"""One case of the kernel benchmark: rows over programs at square sites, and the bytes that it cannot do without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

MIXED = 0  # a case's rank: 8 to 128, mixed
_MIXED_RANKS = (8, 16, 32, 64, 128)
_ALIGN = 64  # elements; as the arena lays blocks out
_MOST_COPIES = 512


@dataclass(frozen=True, slots=True)
class Case:
    """``rows`` rows of ``programs`` distinct adapters at sites of [hidden, hidden]. rank: MIXED for 8 to 128."""

    hidden: int
    rank: int
    rows: int
    programs: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """By program."""
        if self.rank != MIXED:
            return (self.rank,) * self.programs
        return tuple(_MIXED_RANKS[number % len(_MIXED_RANKS)] for number in range(self.programs))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows by program: equal but for a remainder, as the first ones' extra rows."""
        each, extra = divmod(self.rows, self.programs)
        return tuple(each + (number < extra) for number in range(self.programs))

    def floor_bytes(self, itemsize: int) -> int:
        """x once, each program's factors once, xa written and read, y read and written (docs/kernels.md)."""
        factors = sum(self.ranks) * 2 * self.hidden
        xa = sum(length * rank for length, rank in zip(self.lengths, self.ranks, strict=True))
        return itemsize * (self.rows * self.hidden + factors + 2 * xa + 2 * self.rows * self.hidden)


def cases(hidden: Sequence[int], ranks: Sequence[int], rows: Sequence[int], shares: Sequence[str]) -> Iterator[Case]:
    """The grid. shares: of the rows that have an adapter of their own, among one, half and all."""
    for h in hidden:
        for rank in ranks:
            for count in rows:
                programs = {share: {"one": 1, "half": max(1, count // 2), "all": count}[share] for share in shares}
                yield from (Case(h, rank, count, number) for number in sorted(set(programs.values())))


class World:
    """The case on a device. Its site is there several times with different factors, so that caches stay cold."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> None:
        """cold_bytes: what the copies of the factors should come to."""
        self.case = case
        size = sum(aligned(rank * case.hidden) * 2 for rank in case.ranks)
        itemsize = torch.empty((), dtype=dtype).element_size()
        self.copies = max(1, min(_MOST_COPIES, math.ceil(cold_bytes / (size * itemsize))))
        buffer = torch.empty(size * self.copies, dtype=dtype, device=device).normal_(std=0.02)
        self.tables = ProgramTables(buffer, [SiteShape(case.hidden, case.hidden)] * self.copies)
        self._install(size)
        self.x = torch.randn((case.rows, case.hidden), device=device).to(dtype)
        self.y = torch.zeros_like(self.x)
        uses = zip(case.lengths, range(case.programs), strict=True)
        self.plan = BatchPlan.from_runs([(length, ((handle, 1.0),)) for length, handle in uses])

    def factors(self, site: int) -> list[tuple[Tensor, Tensor]]:
        """A and B of every program."""
        return [self.tables.factors(site, self.tables.operands(handle)[site]) for handle in range(self.case.programs)]

    @cached_property
    def padded(self) -> list[tuple[Tensor, Tensor]]:
        """By copy: all A, [programs, largest rank, hidden], and all B, padded with zeros to the largest rank."""
        return [(self._stacked(site, 0), self._stacked(site, 1)) for site in range(self.copies)]

    def _stacked(self, site: int, which: int) -> Tensor:
        case = self.case
        stack = self.x.new_zeros((case.programs, max(case.ranks), case.hidden))
        for slot, factors in zip(stack, self.factors(site), strict=True):
            slot[: len(factors[which])].copy_(factors[which])
        return stack

    def _install(self, size: int) -> None:
        at = [site * size for site in range(self.copies)]
        for handle, rank in enumerate(self.case.ranks):
            block = aligned(rank * self.case.hidden)
            operands = {site: Operands(rank, 1.0, start, start + block) for site, start in enumerate(at)}
            self.tables.install(handle, operands)
            at = [start + 2 * block for start in at]


def aligned(elements: int) -> int:
    return -(-elements // _ALIGN) * _ALIGN
