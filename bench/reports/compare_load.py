"""Two load runs: latencies, throughput and shares of requests, each with its interval."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onebase.bench.load.result import LoadResult
from onebase.bench.reports import noise
from onebase.bench.reports.figures import Better
from onebase.bench.reports.load_page import latencies, windowed
from onebase.bench.reports.series import Bins, token_times
from onebase.bench.reports.verdict import Row, row_of_interval

_PERCENTILES = (50, 90, 99)
_SHARES: tuple[tuple[str, str, Better], ...] = (
    ("answered", "ok", "higher"),
    ("rejected", "rejected", "lower"),
    ("failed", "failed", "lower"),
)
METHOD = (
    "Load: 99 % intervals of the ratio second / first by a moving-block bootstrap over requests (over stretches of "
    "time for tokens / s); beyond noise when 1 lies outside."
)


def load_rows(first: LoadResult, second: LoadResult) -> Iterator[Row]:
    yield from _latency_rows(first, second)
    summaries = (first.summary.tokens_per_second, second.summary.tokens_per_second)
    yield row_of_interval("tokens / s", summaries, noise.bootstrap(_rates(first), _rates(second), noise.mean), "higher")
    for name, status, better in _SHARES:
        one, other = ([float(request.status == status) for request in windowed(run)] for run in (first, second))
        if one and other and (any(one) or any(other)):
            shown = (100 * sum(one) / len(one), 100 * sum(other) / len(other))
            interval = noise.bootstrap(one, other, noise.mean)
            yield row_of_interval(f"{name}, % of offered", shown, interval, better)


def _latency_rows(first: LoadResult, second: LoadResult) -> Iterator[Row]:
    before, now = (latencies(windowed(run)) for run in (first, second))
    for kind in before:
        one, other = before[kind], now[kind]
        if one and other:
            for percent in _PERCENTILES:
                shown = (1e3 * float(np.percentile(one, percent)), 1e3 * float(np.percentile(other, percent)))
                interval = noise.bootstrap(one, other, noise.percentile(percent))
                yield row_of_interval(f"{kind} p{percent}, ms", shown, interval, "lower")


def _rates(run: LoadResult) -> list[float]:
    """Tokens per second in each stretch of the window."""
    start, end = run.summary.window
    times, weights = token_times(run.requests)
    bins = Bins.over(end - start)
    return [rate for _, rate in bins.rate([time - start for time in times], weights)]
