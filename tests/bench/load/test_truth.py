"""Measured latencies beside the notes of a server that only keeps time, at 200 streams at once."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from onebase.bench.load.capacity import stub
from onebase.bench.load.options import Options
from onebase.bench.load.result import LoadResult
from onebase.bench.load.run import run
from onebase.bench.load.timeline import Row
from onebase.bench.load.worker import Progress
from onebase.bench.load.workload import Workload

STREAMS, TOKENS = 200, 40
FIRST, GAP = 0.25, 0.025
EXACT = 0.002


class Unseen:
    def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
        pass


@dataclass(frozen=True)
class Errors:
    """Measured less true, in seconds: of each first token, each gap, each whole answer."""

    ttft: np.ndarray
    itl: np.ndarray
    e2e: np.ndarray


def measured() -> Iterator[tuple[LoadResult, dict[str, list[float]]]]:
    """Runs, each with the notes of its server. Other work on the machine may spoil some."""
    workload = Workload(
        rate=400.0, seconds=STREAMS / 400, arrivals="even", popularity="distinct", tokens_out=str(TOKENS)
    )
    names = tuple(f"m{index}" for index in range(STREAMS))
    for _ in range(5):
        with stub(FIRST, GAP) as url:
            result = asyncio.run(run(Options(url, workload, names=names, vocabulary=1000), Unseen(), {}))
            with urllib.request.urlopen(f"{url}/log") as answer:
                yield result, json.load(answer)


def errors(result: LoadResult, log: dict[str, list[float]]) -> Errors:
    """Beside what the server did: it notes when a request came and when it wrote each token."""
    assert {record.status for record in result.requests} == {"ok"}
    assert len(result.requests) == STREAMS
    assert max(record.sent for record in result.requests) < min(record.ends or 0.0 for record in result.requests)
    pairs = [(record, log[record.adapter]) for record in result.requests]
    assert all(len(record.gaps) == TOKENS - 1 for record in result.requests)
    return Errors(
        ttft=np.array([(record.ttft or 0.0) - (times[1] - times[0]) for record, times in pairs]),
        itl=np.concatenate([np.array(record.gaps) - np.diff(times[1:]) for record, times in pairs]),
        e2e=np.array([(record.e2e or 0.0) - (times[-1] - times[0]) for record, times in pairs]),
    )


def test_latencies_are_those_of_the_server_within_two_milliseconds() -> None:
    """Medians, of the best of a few runs: the machine has other work."""
    found = []
    for result, log in measured():
        error = errors(result, log)
        found.append(max(float(np.median(np.abs(part))) for part in (error.ttft, error.itl, error.e2e)))
        if found[-1] < EXACT:
            return
    pytest.fail(f"medians of the errors: {found} s")


@pytest.mark.slow
def test_latencies_are_the_known_delays_within_two_milliseconds() -> None:
    """Medians beside what the server was told, on a machine with nothing else to do."""
    found = []
    for result, _ in measured():
        summary = result.summary
        assert summary.ttft is not None
        assert summary.itl is not None
        assert summary.e2e is not None
        whole = FIRST + (TOKENS - 1) * GAP
        pairs = ((summary.ttft.p50, FIRST), (summary.itl.p50, GAP), (summary.e2e.p50, whole))
        found.append(max(abs(ours - true) for ours, true in pairs))
        if found[-1] < EXACT:
            return
    pytest.fail(f"largest errors of the medians: {found} s")
