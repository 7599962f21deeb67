"""Packs: the factors of several programs side by side, so that one pair of matrix products serves them all.

A SitePack holds, for one site, A [columns, in_features] and B [columns, out_features]; each program has a range of
columns (one per rank). A program that enters costs its own bytes once: it takes a gap that a program no longer in use
left, or the end. What gaps waste is bounded: beyond a quarter the pack is laid out anew.
A Panel is the packs, over all sites, of up to PANEL_PROGRAMS programs. Panels keep the masked product from growing
with the square of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from onebase.kernels.tables import Operands, ProgramTables

PANEL_PROGRAMS = 16
_GRANULE = 32  # columns a pack grows by, and may waste whatever its size


class SitePack:
    """The columns of one panel at one site. ``version`` changes whenever any column is written."""

    def __init__(self, tables: ProgramTables, site: int) -> None:
        self._tables = tables
        self._site = site
        self._a = tables.buffer.new_empty((0, tables.sites[site].in_features))
        self._b = tables.buffer.new_empty((0, tables.sites[site].out_features))
        self.columns: dict[int, tuple[int, int]] = {}
        self.used = 0
        self.version = 0

    @property
    def a(self) -> Tensor:
        """[used, in_features]"""
        return self._a[: self.used]

    @property
    def b(self) -> Tensor:
        """[used, out_features]"""
        return self._b[: self.used]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._a, self._b))

    def ensure(self, wanted: dict[int, Operands]) -> None:
        """Give every wanted program its columns; columns of others may be overwritten. Ranks are above 0."""
        missing = [handle for handle in wanted if handle not in self.columns]
        for handle in missing:
            self._put(handle, wanted[handle], keep=wanted)
        if self.used > 1.25 * sum(op.rank for op in wanted.values()) + _GRANULE:
            self._lay_out(wanted)

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
        self.used = max(self.used, stop)
        self.version += 1

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
        capacity = -(-columns // _GRANULE) * _GRANULE
        self._a = _grown(self._a, capacity, self.used)
        self._b = _grown(self._b, capacity, self.used)


class Panel:
    """Packs by site, made when a site is first used."""

    def __init__(self, tables: ProgramTables) -> None:
        self._tables = tables
        self.handles: set[int] = set()
        self.packs: dict[int, SitePack] = {}

    def pack(self, site: int) -> SitePack:
        if site not in self.packs:
            self.packs[site] = SitePack(self._tables, site)
        return self.packs[site]


class Panels:
    """Which panel holds which program. A placement is a matter of cost only: packs fill themselves when used."""

    def __init__(self, tables: ProgramTables) -> None:
        self._tables = tables
        self._panels: list[Panel] = []
        self._packable: dict[tuple[int, int], bool] = {}

    def place(self, handles: Sequence[int]) -> list[tuple[Panel, tuple[int, ...]]]:
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
        return [(panel, tuple(sorted(panel.handles))) for panel in self._panels]

    def packable(self, site: int, handle: int, op: Operands) -> bool:
        """Whether B is finite: zero times a neighbour's infinity would not be zero."""
        key = (handle, site)
        if key not in self._packable:
            _, b = self._tables.factors(site, op)
            self._packable[key] = math.isfinite(b.sum(dtype=torch.float32).item())
        return self._packable[key]

    def forget(self, handle: int) -> None:
        for panel in self._panels:
            panel.handles.discard(handle)
            for pack in panel.packs.values():
                pack.columns.pop(handle, None)
        self._panels = [panel for panel in self._panels if panel.handles]
        for site in range(len(self._tables.sites)):
            self._packable.pop((handle, site), None)

    @property
    def num_bytes(self) -> int:
        """Host memory that the packs hold."""
        return sum(pack.num_bytes for panel in self._panels for pack in panel.packs.values())

    def _dissolve(self, limit: int) -> None:
        self._panels.sort(key=lambda panel: -len(panel.handles))
        del self._panels[limit:]

    def _roomy(self) -> Panel:
        for panel in self._panels:
            if len(panel.handles) < PANEL_PROGRAMS:
                return panel
        self._panels.append(Panel(self._tables))
        return self._panels[-1]


def _grown(old: Tensor, capacity: int, used: int) -> Tensor:
    new = old.new_zeros((capacity, old.shape[1]))
    new[:used].copy_(old[:used])
    return new
