"""Low-rank updates in C for rows that share few factors: one call for a group of sites, factors read where they lie.

What a program does at each site is read from the tables' own array, so a plan needs but a list of its (row, program)
pairs, and a program that joins costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, byref, c_int64
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels import huge_pages
from onebase.kernels.native.library import Native, Updates, has_wide_vectors, native
from onebase.kernels.plan import Segment
from onebase.kernels.tables import ProgramTables, wrong_operands

_HEAD, _PER_SITE = 4, 4  # numbers of ``struct group`` and of each of its sites
_RANKS = 1 << 14  # of rows that are split over threads; more of them are not split


@dataclass(frozen=True, slots=True, eq=False)
class RowPairs:
    """The (row, program) pairs of some segments, as the C function reads them. Rows with the largest ranks come first.

    updates points into arrays; they must live as long. tokens: sites where a program has an embedding's operands.
    """

    updates: Updates
    arrays: tuple[NDArray[np.int64] | NDArray[np.float64], ...]
    tokens: frozenset[int]

    def check(self, sites: tuple[int, ...]) -> None:
        """Raise ValueError where one of the programs has an embedding's operands at one of the sites."""
        if not self.tokens.isdisjoint(sites):
            raise wrong_operands(min(self.tokens.intersection(sites)))


class NativeRows:
    """Adds what programs say to rows. It has scratch of its own: one call at a time."""

    def __init__(self, tables: ProgramTables, functions: Native) -> None:
        huge_pages.advise(tables.buffer)
        self._tables = tables
        self._functions = functions
        self._groups: dict[tuple[int, ...], Array[c_int64]] = {}
        widest = max((site.out_features for site in tables.sites), default=0)
        self._most = -(-widest // 16) * 16
        self._xa = torch.empty(_RANKS, dtype=torch.float32)
        self._sums = torch.empty(0, dtype=torch.float32)

    @classmethod
    def of(cls, tables: ProgramTables) -> NativeRows | None:
        """None where there is no library, none for the arena's type, or the processor is faster without."""
        functions = native(tables.buffer.dtype) if has_wide_vectors() else None
        return None if functions is None else cls(tables, functions)

    def pairs(self, segments: Sequence[Segment]) -> RowPairs:
        """The programs must be installed, and stay so as long as the pairs are used."""
        by_row: dict[int, list[Segment]] = {}
        for segment in segments:
            for row in range(segment.start, segment.stop):
                by_row.setdefault(row, []).append(segment)
        rows = sorted(by_row, key=lambda row: -sum(self._rank(segment.handle) for segment in by_row[row]))
        uses = [segment for row in rows for segment in by_row[row]]
        arrays = (
            np.array(rows, dtype=np.int64),
            np.cumsum([0, *(len(by_row[row]) for row in rows)], dtype=np.int64),
            np.array([self._tables.row(segment.handle) for segment in uses], dtype=np.int64),
            np.array([segment.scale for segment in uses], dtype=np.float64),
        )
        updates = Updates(arena=self._tables.buffer.data_ptr(), program=len(self._tables.sites), count=len(rows))
        updates.rows, updates.firsts, updates.programs, updates.scales = (array.ctypes.data for array in arrays)
        updates.xa, updates.ranks, updates.most = self._xa.data_ptr(), _RANKS, self._most
        return RowPairs(updates, arrays, self._tables.token_sites(segment.handle for segment in segments))

    def add(self, ys: Sequence[Tensor], x: Tensor, sites: tuple[int, ...], pairs: RowPairs) -> None:
        """y[row] += scale * (op.scale * (x[row] A^T) B + add_out), at each site into its y.

        x: [rows, in_features]; ys: [rows, out_features] each, all of last stride 1. The sites are checked.
        """
        threads, updates = torch.get_num_threads(), pairs.updates
        if len(self._sums) != threads * self._most:
            self._sums = torch.empty(threads * self._most, dtype=torch.float32)
        updates.table, updates.threads = self._tables.device_table.data_ptr(), threads
        updates.sums = self._sums.data_ptr()
        self._functions.low_rank(byref(updates), self._group(ys, x, sites))

    def _group(self, ys: Sequence[Tensor], x: Tensor, sites: tuple[int, ...]) -> Array[c_int64]:
        """``struct group``; what stays the same from call to call is kept."""
        group = self._groups.get(sites)
        if group is None:
            group = self._groups[sites] = self._lay_out(sites)
        group[0], group[1] = x.data_ptr(), x.stride(0)
        at = _HEAD
        for y in ys:
            group[at], group[at + 1] = y.data_ptr(), y.stride(0)
            at += _PER_SITE
        return group

    def _lay_out(self, sites: tuple[int, ...]) -> Array[c_int64]:
        numbers = [0, 0, self._tables.sites[sites[0]].in_features, len(sites)]
        for site in sites:
            numbers += [0, 0, self._tables.sites[site].out_features, site]
        return (c_int64 * len(numbers))(*numbers)

    def _rank(self, handle: int) -> int:
        operands = self._tables.operands(handle).values()
        return max((op.rank for op in operands if not op.token), default=0)
