"""One request from its bytes to its record."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Protocol

from onebase.bench.load.events import EventStream
from onebase.bench.load.http import Pool
from onebase.bench.load.requests import Encoder, Target
from onebase.bench.load.result import RequestRecord, Status
from onebase.bench.load.workload import Planned

_REJECTED = (429, 503)
_MOST_ERROR = 500  # characters of an error that are kept


class Watcher(Protocol):
    """Told of every request as it goes on."""

    def began(self) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def add_tokens(self, count: int) -> None: ...

    def ended(self, record: RequestRecord) -> None: ...


class _Answer:
    """Takes an answer. enough: set when the client has seen as much as it wants to."""

    def __init__(self, cancel_after: int | None, watcher: Watcher) -> None:
        self.status = 0
        self.sent_at = time.perf_counter()
        self.stream = EventStream()
        self.other = b""  # of an answer that is no stream
        self.enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cancel_after = cancel_after
        self._watcher = watcher

    def sent(self, now: float) -> None:
        self.sent_at = now

    def head(self, status: int) -> None:
        self.status = status

    def body(self, data: bytes, now: float) -> None:
        if self.status != 200:
            self.other = (self.other + data)[:_MOST_ERROR]
            return
        pieces = self.stream.pieces
        before = len(pieces)
        self.stream.feed(data, now)
        if len(pieces) > before:
            self._news(before, len(pieces), now)

    def _news(self, before: int, after: int, now: float) -> None:
        if not before:
            self._watcher.first_token(now - self.sent_at)
        self._watcher.add_tokens(after - before)
        if self._cancel_after is not None and after >= self._cancel_after and not self.enough.done():
            self.enough.set_result(None)


class Client:
    """Sends requests of one target. start: of the run, as time.perf_counter has it. tenants: their names."""

    def __init__(self, target: Target, tenants: Sequence[str], start: float, watcher: Watcher, pool: Pool) -> None:
        self._timeout = target.timeout
        self._tenants = tenants
        self._start = start
        self._watcher = watcher
        self._pool = pool
        self._encoder = Encoder(target)

    def encode(self, planned: Planned) -> bytes:
        return self._encoder.encode(planned)

    async def send(self, planned: Planned, request: bytes, at: float) -> RequestRecord:
        """Until the answer is whole, fails, or is broken off. at: when it was due. Never raises, but when cancelled."""
        self._watcher.began()
        answer = _Answer(planned.cancel_after, self._watcher)
        status, error = await self._outcome(request, answer)
        record = self._record(planned, at, answer, status, error)
        self._watcher.ended(record)
        return record

    async def _outcome(self, request: bytes, answer: _Answer) -> tuple[Status, str | None]:
        exchange = asyncio.ensure_future(self._pool.exchange(request, answer))
        try:
            await asyncio.wait((exchange, answer.enough), timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _broken_off(exchange)
            return "cancelled", "the run was stopped"
        if not exchange.done():
            await _broken_off(exchange)
            return ("cancelled", None) if answer.enough.done() else ("failed", f"no end within {self._timeout:g} s")
        if (failure := exchange.exception()) is not None:
            return "failed", f"{type(failure).__name__}: {failure}"[:_MOST_ERROR]
        return _judged(answer)

    def _record(self, planned: Planned, at: float, answer: _Answer, status: Status, error: str | None) -> RequestRecord:
        stream = answer.stream
        times = [piece - self._start for piece in stream.pieces]
        return RequestRecord(
            at=at,
            adapter=planned.model,
            tenant=self._tenants[planned.tenant],
            tokens_in=planned.tokens_in if stream.tokens_in is None else stream.tokens_in,
            tokens_out=len(times) if stream.tokens_out is None else stream.tokens_out,
            sent=answer.sent_at - self._start,
            first=times[0] if times else None,
            ends=times[-1] if times else None,
            gaps=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
            status=status,
            error=error,
        )


def _judged(answer: _Answer) -> tuple[Status, str | None]:
    """Of an answer that is whole as far as HTTP goes."""
    if answer.status != 200:
        text = answer.other.decode(errors="replace")
        return "rejected" if answer.status in _REJECTED else "failed", f"{answer.status}: {text}"
    if answer.stream.error is not None:
        return "failed", answer.stream.error
    if not answer.stream.events:
        return "failed", "200, but no event: the server did not stream"
    return "ok", None


async def _broken_off(exchange: asyncio.Future[None]) -> None:
    """Its connection is closed."""
    exchange.cancel()
    await asyncio.wait((exchange,))
