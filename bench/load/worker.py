"""A client process. Its assignment is the first line of its input; then it is told when to start, or to stop.

Lines of JSON go both ways: it says that it is ready, then its progress four times a second, at last its outcome.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import uvloop

from onebase.bench.load.background import background
from onebase.bench.load.client import Client
from onebase.bench.load.driver import Driver
from onebase.bench.load.http import Address, Pool
from onebase.bench.load.lag import watch_lag
from onebase.bench.load.requests import Target
from onebase.bench.load.result import RequestRecord
from onebase.bench.load.workload import Planned

NEWS_SECONDS = 0.25
MOST_WARM = 32  # connections that an open loop begins with
MOST_LINE = 1 << 31  # bytes of an assignment or an outcome


@dataclass(frozen=True, slots=True)
class Assignment:
    """clients: of a closed loop; 0: an open one. until: when a closed one stops sending."""

    target: Target
    tenants: tuple[str, ...]
    plan: tuple[Planned, ...]
    clients: int
    until: float | None


@dataclass(frozen=True, slots=True)
class Order:
    """What the parent says. start: on the clock that time.perf_counter reads in all processes of a machine."""

    start: float | None = None
    stop: bool = False


@dataclass(slots=True)
class Progress:
    """Counts since the start, and the latencies to first tokens since the last news. tokens: pieces of text, until a
    request has ended and its tokens are known."""

    sent: int = 0
    ok: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    last_error: str | None = None

    def began(self) -> None:
        self.sent += 1

    def first_token(self, seconds: float) -> None:
        self.first.append(seconds)

    def add_tokens(self, count: int) -> None:
        self.tokens += count

    def ended(self, record: RequestRecord) -> None:
        setattr(self, record.status, getattr(self, record.status) + 1)
        pieces = 0 if record.first is None else 1 + len(record.gaps)
        self.tokens += record.tokens_out - pieces  # a piece may be of several tokens: now they are known
        if record.status in ("rejected", "failed"):
            self.last_error = record.error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process did. cpu: share of a core that it took while it ran."""

    records: tuple[RequestRecord, ...]
    lag_p99: float
    lag_max: float
    cpu: float


@dataclass(frozen=True, slots=True)
class News:
    """One of these; neither: ready to start."""

    progress: Progress | None = None
    outcome: Outcome | None = None


async def drive(
    assignment: Assignment, orders: asyncio.Queue[Order], progress: Progress, ready: Callable[[], None]
) -> Outcome:
    """Call ``ready``, wait for the order to start, then send the plan. Another order stops it."""
    pool = Pool(Address.parse(assignment.target.url))
    await pool.warm(assignment.clients or min(MOST_WARM, len(assignment.plan)))
    gc.freeze()
    ready()
    order = await orders.get()
    if order.start is None:
        return Outcome((), 0.0, 0.0, 0.0)
    client = Client(assignment.target, assignment.tenants, order.start, progress, pool)
    driver = Driver(client, order.start, assignment.until)
    began, cpu, samples = time.perf_counter(), time.process_time(), [0.0]
    async with background(watch_lag(samples)), background(_stopping(orders, driver)):
        if assignment.clients:
            records = await driver.closed_loop(assignment.plan, assignment.clients)
        else:
            records = await driver.open_loop(assignment.plan)
    pool.close()
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    return Outcome(tuple(records), float(np.percentile(samples, 99)), max(samples), share)


async def _stopping(orders: asyncio.Queue[Order], driver: Driver) -> None:
    while not (await orders.get()).stop:
        pass
    driver.stop()


async def _serve() -> None:
    reader = asyncio.StreamReader(limit=MOST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    assignment = msgspec.json.decode(await reader.readline(), type=Assignment)
    orders: asyncio.Queue[Order] = asyncio.Queue()
    progress = Progress()
    async with background(_listen(reader, orders)), background(_tell(progress)):
        outcome = await drive(assignment, orders, progress, lambda: say(News()))
    say(News(progress))
    say(News(outcome=outcome))


async def _listen(reader: asyncio.StreamReader, orders: asyncio.Queue[Order]) -> None:
    """The end of the input, where the parent has died, is an order to stop."""
    while line := await reader.readline():
        orders.put_nowait(msgspec.json.decode(line, type=Order))
    orders.put_nowait(Order(stop=True))


async def _tell(progress: Progress) -> None:
    while True:
        await asyncio.sleep(NEWS_SECONDS)
        say(News(progress))
        progress.first.clear()


def say(news: News) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(news) + b"\n")
    sys.stdout.buffer.flush()


def raise_file_limit() -> None:
    """As many connections as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
