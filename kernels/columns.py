"""The right factors of programs in use, side by side by site: what a gather of contiguous rows reads.

A program has the same range of columns (one per rank) at every site, so that layouts and indices are shared by sites.
One that joins costs a copy of its own factors, once; one that is no longer used stays until the room is needed or the
program is removed. Memory is reserved for as many columns as the arena's size allows and is taken page by page, so
that growing moves nothing: what was never written costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from onebase.kernels.tables import ProgramTables

_SLACK = 64  # columns that gaps may waste whatever the size


class Columns:
    """``generation`` changes whenever a program loses its columns."""

    def __init__(self, tables: ProgramTables) -> None:
        self._tables = tables
        self._widths: dict[int, int] = {}  # of placed programs, the least recently used first
        self._matrices: dict[int, Tensor] = {}
        total = sum(site.out_features for site in tables.sites)
        self.capacity = tables.buffer.numel() // max(1, total)
        self.starts: dict[int, int] = {}
        self.generation = 0
        self.top = 0  # columns that were ever written

    def matrix(self, site: int) -> Tensor:
        """[capacity, out_features]; rows outside the ranges of programs that touch the site hold anything."""
        if site not in self._matrices:
            shape = (self.capacity, self._tables.sites[site].out_features)
            self._matrices[site] = self._tables.buffer.new_empty(shape)
        return self._matrices[site]

    def place(self, widths: dict[int, int]) -> set[int]:
        """Give columns to these programs (handle -> largest rank); the handles that have them now.

        The others found no room. Programs beside them may lose theirs.
        """
        for handle in widths.keys() & self._widths.keys():
            self._widths[handle] = self._widths.pop(handle)
        for handle, width in widths.items():
            if handle not in self.starts and (start := self._room(width, widths)) is not None:
                self._put(handle, start, width)
        return widths.keys() & self.starts.keys()

    def stand(self, starts: Mapping[int, int]) -> bool:
        """Whether these programs have their columns where they had them."""
        return starts.items() <= self.starts.items()

    def forget(self, handle: int) -> None:
        if handle in self.starts:
            self._evict(handle)
        if not self.starts:
            self._matrices.clear()
            self.top = 0

    def _room(self, width: int, wanted: dict[int, int]) -> int | None:
        allowance = sum(wanted.values()) * 5 // 4 + _SLACK
        start = self._gap(width)
        while start + width > min(allowance, self.capacity):
            idle = next((handle for handle in self._widths if handle not in wanted), None)
            if idle is None:
                break
            self._evict(idle)
            start = self._gap(width)
        return start if start + width <= self.capacity else None

    def _gap(self, width: int) -> int:
        """The lowest start with room for so many columns."""
        start = 0
        for low, handle in sorted((low, handle) for handle, low in self.starts.items()):
            if low - start >= width:
                return start
            start = max(start, low + self._widths[handle])
        return start

    def _put(self, handle: int, start: int, width: int) -> None:
        for site, op in self._tables.operands(handle).items():
            if op.rank and not op.token:
                self.matrix(site)[start : start + op.rank].copy_(self._tables.factors(site, op)[1])
        self.starts[handle], self._widths[handle] = start, width
        self.top = max(self.top, start + width)

    def _evict(self, handle: int) -> None:
        del self.starts[handle], self._widths[handle]
        self.generation += 1
