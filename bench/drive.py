"""Drives our engine in this process with timed requests, and keeps what happened to each of them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onebase.bench.ours import raise_failures
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams, TokenOutput

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Job:
    """A request to send. at: seconds after the start; None: when a client is free. watched: counted in the figures.
    tenant: whose it is."""

    use: AdapterUse | None
    prompt: tuple[int, ...]
    tokens_out: int
    at: float | None = None
    watched: bool = True
    tenant: str = ""


@dataclass(slots=True)
class Trace:
    """What happened to one job, in seconds of one clock. tokens: when each came."""

    job: Job
    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in itertools.pairwise(self.tokens)]


@dataclass(frozen=True, slots=True)
class Run:
    """All traces of one run, and how long it took."""

    traces: tuple[Trace, ...]
    seconds: float

    @property
    def watched(self) -> list[Trace]:
        return [trace for trace in self.traces if trace.job.watched]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(trace.tokens) for trace in self.watched) / self.seconds

    def ttft(self, percent: float) -> float:
        """Percentile of the time to first token, in seconds."""
        return float(np.percentile([trace.ttft for trace in self.watched], percent))

    def gap(self, percent: float) -> float:
        """Percentile of the inter-token latency, in seconds."""
        return float(np.percentile([gap for trace in self.watched for gap in trace.gaps], percent))


class Driver:
    """Feeds one engine. Jobs without a time are sent by ``clients`` clients, the others at their time."""

    def __init__(self, engine: Engine, clients: int = 0) -> None:
        self._engine = engine
        self._clients = clients
        self._running: dict[str, Trace] = {}

    def run(self, jobs: Sequence[Job], *, to_end: bool = True) -> Run:
        """Until every job is done; without ``to_end`` until the watched ones are, and the others are aborted. Raises
        RuntimeError where one fails."""
        start = time.perf_counter()
        timed = deque(sorted((job for job in jobs if job.at is not None), key=lambda job: job.at or 0.0))
        free = deque(job for job in jobs if job.at is None)
        traces: list[Trace] = []
        while timed or free or self._running:
            now = time.perf_counter()
            traces += [self._send(job) for job in self._due(timed, free, now - start)]
            self._step(timed, start)
            if not to_end and not any(job.watched for job in self._open(timed, free)):
                timed.clear()
                self._abort()
        return Run(tuple(traces), time.perf_counter() - start)

    def _open(self, timed: Iterable[Job], free: Iterable[Job]) -> Iterator[Job]:
        """Jobs that are not done."""
        return itertools.chain(timed, free, (trace.job for trace in self._running.values()))

    def _abort(self) -> None:
        for request_id in self._running:
            self._engine.abort(request_id)
        self._running.clear()

    def _due(self, timed: deque[Job], free: deque[Job], now: float) -> Iterator[Job]:
        while timed and (timed[0].at or 0.0) <= now:
            yield timed.popleft()
        closed = sum(trace.job.at is None for trace in self._running.values())
        for _ in range(min(self._clients - closed, len(free))):
            yield free.popleft()

    def _send(self, job: Job) -> Trace:
        sampling = SamplingParams(max_tokens=job.tokens_out, temperature=0.0, ignore_eos=True)
        uses = () if job.use is None else (job.use,)
        request = Request(f"drive-{next(_ids)}", job.prompt, sampling, uses, tenant=job.tenant)
        trace = self._running[request.id] = Trace(job, time.perf_counter())
        raise_failures(self._engine.add(request))
        return trace

    def _step(self, timed: deque[Job], start: float) -> None:
        """One turn of the engine's loop; where it has nothing to compute, it sleeps."""
        if not self._running:
            if timed:
                time.sleep(max(0.0, start + (timed[0].at or 0.0) - time.perf_counter()))
            return
        outputs = self._engine.step()
        raise_failures(outputs)
        now = time.perf_counter()
        for output in outputs:
            if isinstance(output, TokenOutput):
                self._running[output.id].tokens += [now] * len(output.tokens)
                if output.finish_reason is not None:
                    del self._running[output.id]
        if not self._engine.scheduler.running and self._engine.adapters.busy:
            time.sleep(0.0005)
