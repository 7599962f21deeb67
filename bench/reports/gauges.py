"""Charts of what the server told while a load ran: queue, pages, tiers of adapters, events, prefix cache.

Names are those of load/timeline.py. Counters are drawn as rates, between two looks at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from onebase.bench.load.result import LoadResult
from onebase.bench.load.timeline import TIERS
from onebase.bench.reports.chart import Line, line_chart
from onebase.bench.reports.scale import unit_of_bytes
from onebase.bench.reports.series import Points, in_flight

_QUEUE = {"running": "running", "waiting": "waiting", "waiting_for_adapter": "waiting for an adapter"}
_EVENTS = {"adapter_loads": "loads", "adapter_evictions": "evictions from the device", "preemptions": "preemptions"}


def gauge_charts(result: LoadResult) -> Iterable[str]:
    """A chart for each group of which the server told anything; the queue's in any case, as the client saw it."""
    flight = Line("in flight, seen by the client", in_flight(result.requests, result.seconds), stepped=True)
    yield line_chart("Running and waiting", "time, s", "requests", [flight, *_lines(result, _QUEUE)])
    if pages := _told(result, "kv_cache_usage"):
        used = Line("of all pages", [(at, 100 * share) for at, share in pages], stepped=True)
        yield line_chart("Pages of keys and values in use", "time, s", "%", [used], y_range=(0, 105))
    if shares := _share(result, "prefix_cache_hits", "prefix_cache_queries"):
        found = Line("of the prompt tokens looked for", shares)
        yield line_chart("Prefix cache: tokens found", "time, s", "%", [found], y_range=(0, 105))
    yield from _tiers(result)


def _tiers(result: LoadResult) -> Iterable[str]:
    sizes = _lines(result, _of_tiers("bytes"))
    if sizes:
        factor, unit = unit_of_bytes([size for line in sizes for _, size in line.points])
        scaled = [Line(line.name, [(at, factor * size) for at, size in line.points], stepped=True) for line in sizes]
        yield line_chart("Cache tiers: adapters' memory", "time, s", unit, scaled)
    if counts := _lines(result, _of_tiers("adapters")):
        yield line_chart("Cache tiers: adapters", "time, s", "adapters", counts)
    misses = {name: f"not found: {where}" for name, where in _of_tiers("misses").items()}
    if rates := [Line(name, _rate(result, key)) for key, name in (_EVENTS | misses).items() if _told(result, key)]:
        yield line_chart("Cache tiers: events", "time, s", "a second", rates)


def _of_tiers(what: str) -> dict[str, str]:
    return {f"tier_{tier}_{what}": tier for tier in TIERS}


def _lines(result: LoadResult, names: Mapping[str, str]) -> list[Line]:
    lines = [Line(name, _told(result, key), stepped=True) for key, name in names.items()]
    return [line for line in lines if line.points]


def _told(result: LoadResult, key: str) -> Points:
    return [(row["t"], row[key]) for row in result.timeline if key in row]


def _rate(result: LoadResult, key: str) -> Points:
    """A restarted server counts from zero: nothing is drawn below it."""
    pairs = pairwise(_told(result, key))
    return [(later, max(0.0, now - before) / (later - at)) for (at, before), (later, now) in pairs if later > at]


def _share(result: LoadResult, part: str, whole: str) -> Points:
    """In %, where there was anything to share."""
    parts, wholes = dict(_rate(result, part)), dict(_rate(result, whole))
    return [(at, 100 * parts[at] / value) for at, value in wholes.items() if value and at in parts]
