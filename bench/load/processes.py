"""Client processes: starts them, deals the plan out, and gathers what they say."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace

import msgspec

from onebase.bench.load.worker import MOST_LINE, Assignment, News, Order, Outcome, Progress

START_SECONDS = 0.1  # from the last process that is ready to the start
_MODULE = "onebase.bench.load.worker"


class WorkerDied(RuntimeError):
    """A client process ended without an outcome."""


@dataclass(slots=True)
class Worker:
    """One of them. progress: what it said last; first: latencies to first tokens that nobody has taken yet."""

    process: asyncio.subprocess.Process
    progress: Progress = field(default_factory=Progress)
    first: list[float] = field(default_factory=list)

    def say(self, data: bytes) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(data + b"\n")

    async def hear(self) -> News:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise WorkerDied(f"a client process ended with status {await self.process.wait()}")
        return msgspec.json.decode(line, type=News)

    async def outcome(self) -> Outcome:
        """Its progress is kept while it runs."""
        while (news := await self.hear()).outcome is None:
            assert news.progress is not None
            self.progress = news.progress
            self.first += news.progress.first
        return news.outcome


class Workers:
    """All of them."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    async def run(self) -> tuple[float, asyncio.Future[list[Outcome]]]:
        """When they start, as time.perf_counter has it, and what they will have done. Raises WorkerDied."""
        for worker in self._workers:
            while (await worker.hear()).progress is not None:
                pass  # not ready yet
        start = time.perf_counter() + START_SECONDS
        self._say(Order(start))
        return start, asyncio.gather(*(worker.outcome() for worker in self._workers))

    def stop(self) -> None:
        """Break off what is under way; their outcomes follow soon."""
        self._say(Order(stop=True))

    def progress(self) -> Progress:
        """Summed up. The latencies are those since the last call."""
        counts = [item.name for item in fields(Progress) if item.name not in ("first", "last_error")]
        total = Progress(**{name: sum(getattr(one.progress, name) for one in self._workers) for name in counts})
        for worker in self._workers:
            total.first += worker.first
            worker.first = []
            total.last_error = worker.progress.last_error or total.last_error
        return total

    def _say(self, order: Order) -> None:
        for worker in self._workers:
            worker.say(msgspec.json.encode(order))


@asynccontextmanager
async def workers(assignment: Assignment, processes: int) -> AsyncIterator[Workers]:
    """Started, each with its share of the plan. They end in any case."""
    started: list[Worker] = []
    try:
        for share in deal(assignment, processes):
            started.append(Worker(await _start()))
            started[-1].say(msgspec.json.encode(share))
        yield Workers(started)
    finally:
        for worker in started:
            if worker.process.returncode is None:
                worker.process.kill()
            await worker.process.wait()


def deal(assignment: Assignment, processes: int) -> list[Assignment]:
    """Every n-th request to each process, and as even a share of the clients."""
    count = min(processes, assignment.clients or processes)
    return [
        replace(assignment, plan=assignment.plan[index::count], clients=len(range(index, assignment.clients, count)))
        for index in range(count)
    ]


async def _start() -> asyncio.subprocess.Process:
    """In a session of its own: an interrupt from the terminal is for the parent, which stops the others in order."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        _MODULE,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MOST_LINE,
        start_new_session=True,
    )
