"""How often adapters were used since the start, for their cards: of those used lately, so that memory is bounded."""

from __future__ import annotations

from collections import OrderedDict

MOST = 1 << 16


class Uses:
    """Counts by name and version. The least recently used of many are forgotten, and start again at zero."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._counts: OrderedDict[tuple[str, int], int] = OrderedDict()

    def add(self, name: str, version: int) -> None:
        key = (name, version)
        self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)

    def of(self, name: str, version: int) -> int:
        return self._counts.get((name, version), 0)
