"""One thing at a time, by turns among tenants: who asks for much waits behind itself, not others behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from onebase.serve.engine.fair_queue import FairQueue


class FairTurns:
    """A lock whose waiters are served a tenant at a time, each tenant's in their order. Used on the event loop."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()  # those that left are passed over in their turn

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        await self._enter(tenant)
        try:
            yield
        finally:
            self._pass_on()

    async def _enter(self, tenant: str) -> None:
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(tenant, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given the turn, and left at once
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """To the next waiter that is still there."""
        while self._waiting:
            turn = self._waiting.get()
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._taken = False
