"""Load runs as a server could have answered them: drawn, not measured."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from onebase.bench.load.result import ClientReport, LoadResult, RequestRecord, ServerReport
from onebase.bench.load.slo import Slo
from onebase.bench.load.summary import summarise

MakeRun = Callable[..., LoadResult]


def drawn_run(
    adapters: int = 5, count: int = 200, seconds: float = 20.0, seed: int = 0, slow: float = 1.0, refused: float = 0.05
) -> LoadResult:
    """slow: a factor on every latency; refused: the share of requests that are rejected."""
    random = np.random.default_rng(seed)
    requests = [
        _request(random, seconds * place / count, int(adapters * random.power(0.3)), slow, refused)
        for place in range(count)
    ]
    end = max([seconds, *(request.ends or 0.0 for request in requests)])
    slo = Slo(ttft=1.0, tpot=0.05)
    timeline = tuple(
        {
            "t": float(t),
            "running": 8 + 4 * math.sin(t),
            "waiting": float(t % 3),
            "tier_device_bytes": 1e6 * t,
            "tier_device_adapters": float(min(adapters, t)),
            "tier_device_misses": float(2 * t),
            "adapter_loads": float(3 * t),
            "kv_cache_usage": 0.3,
            "prefix_cache_queries": 100.0 * t,
            "prefix_cache_hits": 25.0 * t,
        }
        for t in range(int(end))
    )
    return LoadResult(
        machine={"device": "a processor", "cores": 2},
        server=ServerReport("http://127.0.0.1:8000", "base", "1"),
        workload={"adapters": adapters, "seed": seed, "slo": {"ttft": 1.0, "tpot": 0.05}},
        seconds=end,
        requests=tuple(requests),
        timeline=timeline,
        client=ClientReport(0.001, 0.01, 0.3),
        summary=summarise(requests, slo, (0.0, seconds)),
    )


def _request(random: np.random.Generator, at: float, adapter: int, slow: float, refused: float) -> RequestRecord:
    name, tenant, sent = f"adapter-{adapter}", f"tenant-{adapter % 2}", at + 0.001
    if random.random() < refused:
        return RequestRecord(at, name, tenant, 100, 0, sent, None, None, (), "rejected", "busy")
    gaps = tuple((slow * random.gamma(5, 0.008, int(random.integers(8, 40)))).tolist())
    first = sent + slow * float(random.gamma(2, 0.15))
    return RequestRecord(at, name, tenant, 100, len(gaps) + 1, sent, first, first + sum(gaps), gaps, "ok")


@pytest.fixture
def make_run() -> MakeRun:
    return drawn_run
