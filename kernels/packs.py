"""Packs: the factors of several programs side by side, so that one pair of matrix products serves them all.

A SitePack holds, for one site, A [columns, in_features] and B [columns, out_features]; each program has a range of
columns (one per rank). A program that enters costs its own bytes once: it takes a gap that a program no longer in use
left, or the end. What gaps waste is bounded: beyond a quarter, and a few granules, the pack is laid out anew.
A pack that stands for many products is prepacked (prepack.py), which doubles its bytes until its columns change.
A Panel is the packs, over all sites, of up to PANEL_PROGRAMS programs. Panels keep the masked product from growing
with the square of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels.prepack import prepack, product
from onebase.kernels.tables import Operands, ProgramTables

PANEL_PROGRAMS = 16
_PREPACK_SPREAD = 8
_GRANULE = 32  # columns a pack grows by, and may waste whatever its size


class SitePack:
    """The columns of one panel at one site. ``version`` changes whenever any column is written."""

    def __init__(self, tables: ProgramTables, site: int, prepack_after: int | None) -> None:
        """prepack_after: products with standing columns before they are prepacked; None for never."""
        self._tables = tables
        self._site = site
        self._a = tables.buffer.new_empty((0, tables.sites[site].in_features))
        self._b = tables.buffer.new_empty((0, tables.sites[site].out_features))
        self._prepack_after = prepack_after
        self._products = 0
        self._prepacked: tuple[Tensor, Tensor] | None = None
        self.columns: dict[int, tuple[int, int]] = {}
        self.used = 0
        self.version = 0

    def shrink(self, x: Tensor) -> Tensor:
        """x @ A.T: [rows, used], all columns."""
        self._products += 1
        if self._products == self._prepack_after:
            a, b = self._a[: self.used], self._b[: self.used]
            self._prepacked = prepack(a, x.shape[0]), prepack(b.T, x.shape[0])
        if self._prepacked is not None:
            return product(x, self._prepacked[0])
        return linear(x, self._a[: self.used])

    def expand(self, xa: Tensor) -> Tensor:
        """xa @ B: [rows, out_features]."""
        if self._prepacked is not None:
            return product(xa, self._prepacked[1])
        return torch.mm(xa, self._b[: self.used])

    def expand_onto(self, y: Tensor, xa: Tensor) -> None:
        """y += xa @ B."""
        if self._prepacked is not None:
            y.add_(product(xa, self._prepacked[1]))
        else:
            y.addmm_(xa, self._b[: self.used])

    def ensure(self, wanted: dict[int, Operands]) -> None:
        """Give every wanted program its columns; columns of others may be overwritten. Ranks are above 0."""
        missing = [handle for handle in wanted if handle not in self.columns]
        self._reserve(self._needed(missing, wanted))
        for handle in missing:
            self._put(handle, wanted[handle], keep=wanted)
        if max(self.used, self._a.shape[0] - _GRANULE) > _allowance(wanted):
            self._lay_out(wanted)

    def _needed(self, missing: Sequence[int], wanted: dict[int, Operands]) -> int:
        """Columns to hold them all, were the missing put at the end; no more than a new layout would be given."""
        return min(self.used + sum(wanted[handle].rank for handle in missing), _allowance(wanted))

    def _lay_out(self, wanted: dict[int, Operands]) -> None:
        self.columns.clear()
        self.used = 0
        self._a, self._b = self._a[:0].clone(), self._b[:0].clone()
        self._reserve(sum(op.rank for op in wanted.values()))
        for handle, op in wanted.items():
            self._put(handle, op, keep=wanted)

    def _put(self, handle: int, op: Operands, keep: dict[int, Operands]) -> None:
        start = self._find_gap(op.rank, keep)
        stop = start + op.rank
        self._evict(start, stop)
        self._reserve(stop)
        a, b = self._tables.factors(self._site, op)
        self._a[start:stop].copy_(a)
        self._b[start:stop].copy_(b)
        self.columns[handle] = (start, stop)
        self.used = max(self.used, _rounded(stop))
        self.version += 1
        self._products, self._prepacked = 0, None

    def _find_gap(self, size: int, keep: Iterable[int]) -> int:
        start = 0
        for low, high in sorted(self.columns[handle] for handle in keep if handle in self.columns):
            if low - start >= size:
                return start
            start = high
        return start

    def _evict(self, start: int, stop: int) -> None:
        overlapped = [h for h, (low, high) in self.columns.items() if low < stop and start < high]
        for handle in overlapped:
            del self.columns[handle]

    def _reserve(self, columns: int) -> None:
        if columns <= self._a.shape[0]:
            return
        capacity = _rounded(columns + columns // 8)  # room for a larger successor
        self._a = _grown(self._a, capacity, self.used)
        self._b = _grown(self._b, capacity, self.used)


class Panel:
    """Packs by site, made when a site is first used."""

    def __init__(self, tables: ProgramTables, prepack_after: int | None) -> None:
        self._tables = tables
        self._prepack_after = prepack_after
        self.handles: set[int] = set()
        self.packs: dict[int, SitePack] = {}

    def pack(self, site: int) -> SitePack:
        """The site's pack. Sites are prepacked in turn, so that no single step pays for all."""
        if site not in self.packs:
            after = None if self._prepack_after is None else self._prepack_after + site % _PREPACK_SPREAD
            self.packs[site] = SitePack(self._tables, site, after)
        return self.packs[site]


class Panels:
    """Which panel holds which program. A placement is a matter of cost only: packs fill themselves when used."""

    def __init__(self, tables: ProgramTables, prepack_after: int | None) -> None:
        self._tables = tables
        self._prepack_after = prepack_after
        self._panels: list[Panel] = []
        self._packable: dict[tuple[int, int], bool] = {}

    def place(self, handles: Sequence[int]) -> list[tuple[Panel, frozenset[int]]]:
        """The panels for these programs, as few as hold them; a program stays where it is if it can."""
        live = set(handles)
        for panel in self._panels:
            panel.handles &= live
        self._panels = [panel for panel in self._panels if panel.handles]
        self._dissolve(math.ceil(len(live) / PANEL_PROGRAMS))
        placed = {handle for panel in self._panels for handle in panel.handles}
        for handle in handles:
            if handle not in placed:
                self._roomy().handles.add(handle)
                placed.add(handle)
        return [(panel, frozenset(panel.handles)) for panel in self._panels]

    def packable(self, site: int, handle: int, op: Operands) -> bool:
        """Whether B is finite (its sum is): zero times a neighbour's infinity would not be zero."""
        key = (handle, site)
        if key not in self._packable:
            _, b = self._tables.factors(site, op)
            self._packable[key] = math.isfinite(b.sum().item())
        return self._packable[key]

    def forget(self, handle: int) -> None:
        for panel in self._panels:
            panel.handles.discard(handle)
            for pack in panel.packs.values():
                pack.columns.pop(handle, None)
        self._panels = [panel for panel in self._panels if panel.handles]
        for site in range(len(self._tables.sites)):
            self._packable.pop((handle, site), None)

    def _dissolve(self, limit: int) -> None:
        self._panels.sort(key=lambda panel: -len(panel.handles))
        for panel in self._panels[limit:]:
            panel.handles.clear()
        del self._panels[limit:]

    def _roomy(self) -> Panel:
        for panel in self._panels:
            if len(panel.handles) < PANEL_PROGRAMS:
                return panel
        self._panels.append(Panel(self._tables, self._prepack_after))
        return self._panels[-1]


def _allowance(wanted: dict[int, Operands]) -> int:
    """Columns that a pack may have for these programs, gaps included."""
    total = sum(op.rank for op in wanted.values())
    return _rounded(total + total // 4 + _GRANULE)


def _rounded(columns: int) -> int:
    """Up to the granule: oneDNN compiles a kernel for each new shape, so there had better be few."""
    return -(-columns // _GRANULE) * _GRANULE


def _grown(old: Tensor, capacity: int, used: int) -> Tensor:
    new = old.new_empty((capacity, old.shape[1]))
    new[:used].copy_(old[:used])
    new[used:].zero_()
    return new
