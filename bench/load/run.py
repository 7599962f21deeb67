"""A whole run: ask the server, draw the plan, let the client processes send it, gather what came of it."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from onebase.bench.load.background import background
from onebase.bench.load.churn import Churn
from onebase.bench.load.options import Options
from onebase.bench.load.processes import Workers, workers
from onebase.bench.load.requests import Target
from onebase.bench.load.result import Change, ClientReport, LoadResult, RequestRecord, ServerReport
from onebase.bench.load.server import Discovered, caller, choose, discover
from onebase.bench.load.summary import Window, summarise
from onebase.bench.load.timeline import Row, watch
from onebase.bench.load.traces import read_trace
from onebase.bench.load.worker import NEWS_SECONDS, Assignment, Outcome, Progress

# Beyond these the client is part of what it measures.
MOST_LAG = 0.010  # seconds, 99th percentile
MOST_LATE = 0.050
MOST_CPU = 0.8


class View(Protocol):
    """Shows how a run goes on."""

    def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
        """A few times a second. gauges: the server's last ones; empty where it has none."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What happened. start: as time.perf_counter has it."""

    outcomes: Sequence[Outcome]
    timeline: Sequence[Row]
    churn: Sequence[Change]

    def records(self) -> list[RequestRecord]:
        return sorted((one for outcome in self.outcomes for one in outcome.records), key=lambda record: record.at)


async def run(options: Options, view: View, machine: Mapping[str, Any]) -> LoadResult:
    """An interrupt ends it early: what came until then is the result.

    Raises ServerUnusable, ValueError for what does not go together, OSError for a trace, WorkerDied.
    """
    async with caller(options.url, options.keys[0]) as client:
        found = await discover(client)
        models = choose(found, options.model, options.adapters, options.names)
        trace = () if options.trace is None else read_trace(options.trace)
        plan = options.workload.plan(models, [sender.share for sender in options.senders], trace)
        assignment = Assignment(
            target=_target(options, found),
            tenants=tuple(sender.name for sender in options.senders),
            plan=tuple(plan),
            clients=options.workload.clients,
            until=options.workload.seconds if options.workload.closed else None,
        )
        async with workers(assignment, options.processes) as group:
            done = await _watched(options, group, models, view)
    return _result(options, found, len(models), done, machine)


async def _watched(options: Options, group: Workers, models: Sequence[str], view: View) -> _Run:
    rows: list[Row] = []
    start, outcomes = await group.run()
    async with caller(options.url, options.keys[0]) as client, _churning(options, models, start) as changes:
        with _interrupted(group.stop):
            async with background(watch(client, start, rows, options.scrape)):
                while not outcomes.done():
                    await asyncio.wait((outcomes,), timeout=NEWS_SECONDS)
                    view.update(time.perf_counter() - start, group.progress(), rows[-1] if rows else {})
    return _Run(outcomes.result(), rows, changes)


@asynccontextmanager
async def _churning(options: Options, models: Sequence[str], start: float) -> AsyncIterator[Sequence[Change]]:
    """Adapters change while the body runs."""
    if options.churn is None:
        yield ()
        return
    async with caller(options.url, options.admin_key or options.keys[0]) as client:
        churn = Churn(options.churn, client, models, start)
        async with background(churn.run()):
            yield churn.changes
        await churn.clean()


@contextmanager
def _interrupted(stop: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _target(options: Options, found: Discovered) -> Target:
    return Target(
        url=options.url,
        endpoint=options.endpoint,
        vocabulary=found.vocabulary if options.vocabulary is None else options.vocabulary,
        keys=options.keys,
        seed=options.workload.seed,
        ignore_eos=options.ignore_eos,
        timeout=options.timeout,
    )


def _result(options: Options, found: Discovered, models: int, done: _Run, machine: Mapping[str, Any]) -> LoadResult:
    records = done.records()
    seconds = max((record.ends or record.sent for record in records), default=0.0)
    window, warnings = _window(options, seconds)
    return LoadResult(
        machine=machine,
        server=ServerReport(options.url, options.model or found.base, found.version),
        workload=options.parameters(models),
        seconds=seconds,
        requests=tuple(records),
        timeline=tuple(done.timeline),
        client=_client(done.outcomes, records, warnings),
        summary=summarise(records, options.slo, window),
        churn=tuple(done.churn),
    )


def _window(options: Options, seconds: float) -> tuple[Window, list[str]]:
    """What is measured. The end counts: a request that is due at the very end belongs to it."""
    start, end = options.warm_up, seconds - options.tail
    if start < end:
        return (start, end if options.tail else math.nextafter(end, math.inf)), []
    return (0.0, math.nextafter(seconds, math.inf)), ["warm-up and tail left nothing: nothing was cut"]


def _client(outcomes: Sequence[Outcome], records: Sequence[RequestRecord], warnings: Sequence[str]) -> ClientReport:
    late = [max(0.0, record.sent - record.at) for record in records] or [0.0]
    lag, cpu = (max(values) for values in ([one.lag_p99 for one in outcomes], [one.cpu for one in outcomes]))
    late_p99 = float(np.percentile(late, 99))
    found = [
        *warnings,
        *([f"the client's event loop lagged {lag * 1000:.0f} ms (p99)"] if lag > MOST_LAG else []),
        *([f"requests were sent {late_p99 * 1000:.0f} ms late (p99)"] if late_p99 > MOST_LATE else []),
        *([f"a client process took {cpu:.0%} of a core: use more --processes"] if cpu > MOST_CPU else []),
    ]
    return ClientReport(
        lag_p99=lag,
        lag_max=max(one.lag_max for one in outcomes),
        cpu=cpu,
        late_p99=late_p99,
        late_max=max(late),
        processes=len(outcomes),
        warnings=tuple(found),
    )
