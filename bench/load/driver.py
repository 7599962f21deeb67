"""Sends a part of the plan: open loop, each request when it is due whatever becomes of the others; or closed loop,
clients that send their next request when their last one is done."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

from onebase.bench.load.client import Client
from onebase.bench.load.result import RequestRecord
from onebase.bench.load.workload import Planned


class Driver:
    """start: of the run, as time.perf_counter has it, and not long past. until: when to stop sending, in seconds."""

    def __init__(self, client: Client, start: float, until: float | None = None) -> None:
        self._client = client
        self._start = start
        self._until = until
        self._tasks: set[asyncio.Task[None]] = set()
        self._records: list[RequestRecord] = []
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Send nothing more, and break off what is under way: those are records, too."""
        self._stopped.set()
        for task in self._tasks:
            task.cancel()

    async def open_loop(self, plan: Sequence[Planned]) -> list[RequestRecord]:
        """plan: in order of time."""
        for planned in plan:
            request = self._client.encode(planned)
            assert planned.at is not None
            await self._wait_until(planned.at)
            if self._stopped.is_set():
                break
            self._spawn(self._one(planned, request, planned.at))
        return await self._all()

    async def closed_loop(self, plan: Sequence[Planned], clients: int) -> list[RequestRecord]:
        """Clients take their requests from one line."""
        left = deque(plan)
        await self._wait_until(0.0)
        for _ in range(min(clients, len(plan))):
            self._spawn(self._client_of(left))
        return await self._all()

    async def _client_of(self, left: deque[Planned]) -> None:
        while left and not self._stopped.is_set() and (self._until is None or self._now() < self._until):
            due = self._now()
            planned = left.popleft()
            await self._one(planned, self._client.encode(planned), due)

    async def _one(self, planned: Planned, request: bytes, at: float) -> None:
        self._records.append(await self._client.send(planned, request, at))

    async def _all(self) -> list[RequestRecord]:
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        return self._records

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    async def _wait_until(self, at: float) -> None:
        """Sleeps are as exact as the loop's timer: it may wake up a little early, and waits again."""
        while (left := at - self._now()) > 0 and not self._stopped.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), left)

    def _now(self) -> float:
        return time.perf_counter() - self._start
