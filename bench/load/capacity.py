"""`onebase bench client`: how much of a stream one client process can take, beside a server that only keeps time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onebase.bench.load.options import Options
from onebase.bench.load.result import LoadResult
from onebase.bench.load.run import run
from onebase.bench.load.timeline import Row
from onebase.bench.load.worker import Progress
from onebase.bench.load.workload import Workload

_FIRST = 0.1  # seconds to the first token


@dataclass(frozen=True, slots=True)
class Case:
    """streams: at once; tokens: of each; gap: seconds between a stream's tokens."""

    streams: int
    tokens: int
    gap: float
    processes: int = 1

    @property
    def offered(self) -> float:
        """Tokens a second that the server means to send."""
        return self.streams / self.gap


@contextmanager
def stub(first: float, gap: float) -> Iterator[str]:
    """Its URL while it runs, in a process of its own. Delays in seconds."""
    command = [sys.executable, "-P", "-m", "onebase.bench.load.stub", str(first), str(gap)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class _Unseen:
    def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
        pass


def measure(case: Case) -> LoadResult:
    """A closed loop in which every client has one stream."""
    workload = Workload(clients=case.streams, requests=case.streams, tokens_out=str(case.tokens), seconds=None)
    with stub(_FIRST, case.gap) as url:
        options = Options(url, workload, model="base", vocabulary=1000, processes=case.processes)
        return asyncio.run(run(options, _Unseen(), {}))


def show(case: Case, rounds: int, out: Path | None) -> None:
    """Print what the client took, and what it cost."""
    from onebase.bench.report import Spread, print_table, store

    results = [measure(case) for _ in range(rounds)]
    rates = [result.summary.tokens_per_second for result in results]
    cpu = [result.client.cpu * case.processes / rate for result, rate in zip(results, rates, strict=True)]
    rows = [
        ["offered, tokens/s", f"{case.offered:.0f}"],
        ["taken, tokens/s", str(Spread(tuple(rates)))],
        ["client's CPU, us/token", str(Spread(tuple(1e6 * one for one in cpu)))],
        ["a core would take, tokens/s", f"{1 / Spread(tuple(cpu)).median:.0f}"],
        ["event loop's lag p99, ms", str(Spread(tuple(1e3 * result.client.lag_p99 for result in results)))],
    ]
    print_table(f"{case.streams} streams, {case.processes} client processes", (), rows)
    figures = {"streams": case.streams, "processes": case.processes, "offered": case.offered}
    store(out, "client", figures | {"tokens_per_second": rates, "cpu_seconds_per_token": cpu})
