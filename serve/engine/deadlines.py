"""Requests with a ``timeout``: which of them have waited or run for too long."""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush

_SLACK = 64  # ended requests that may stay in the heap, beside as many as there are live ones


class Deadlines:
    """Deadlines by request id. What a step costs does not follow from how many there are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds, never going back."""
        self._clock = clock
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def add(self, request_id: str, timeout: float | None) -> None:
        """timeout: seconds from now; None: never."""
        if timeout is not None:
            self._due[request_id] = self._clock() + timeout
            heappush(self._heap, (self._due[request_id], request_id))

    def remove(self, request_id: str) -> None:
        """It ended, with a deadline or without."""
        self._due.pop(request_id, None)
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            self._heap = [(due, name) for name, due in self._due.items()]
            heapify(self._heap)

    def expired(self) -> list[str]:
        """Those whose time is over. They are told once."""
        over: list[str] = []
        now = self._clock() if self._heap else 0.0
        while self._heap and self._heap[0][0] <= now:
            due, request_id = heappop(self._heap)
            if self._due.get(request_id) == due:
                del self._due[request_id]
                over.append(request_id)
        return over
