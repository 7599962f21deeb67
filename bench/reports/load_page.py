"""A load run as a page: figures, latencies, the run over time, adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onebase.bench.load.result import LoadResult, Measures, RequestRecord, Stats
from onebase.bench.reports import page
from onebase.bench.reports.chart import Line, Mark, line_chart
from onebase.bench.reports.gauges import gauge_charts
from onebase.bench.reports.heat import HeatRow, groups, heat
from onebase.bench.reports.scale import number, unit_of_seconds
from onebase.bench.reports.series import Bins, by_popularity, cdf, token_times

_LATENCIES = (
    ("TTFT", "time to first token"),
    ("TPOT", "time per output token after the first"),
    ("ITL", "gap between two pieces of text"),
    ("E2E", "from sending to the last token"),
)
_IN_TABLE = 25
Named = Sequence[tuple[str, LoadResult]]


def load_page(name: str, result: LoadResult) -> str:
    """The whole document. name: what the run is called."""
    return page.page(f"Load: {name}", subtitle(result), [*load_sections(name, result)])


def load_sections(name: str, result: LoadResult) -> Iterable[str]:
    yield page.cards(_cards(result.summary))
    yield from (page.note(f"Not to be trusted: {text}", "warn") for text in result.client.warnings)
    yield page.section("Latencies", page.charts(*latency_charts([(name, result)])), latency_table(result.summary))
    yield page.section("Over time", page.charts(*_over_time(result)))
    yield page.section("Adapters", page.charts(*_heats(result), _popularity(result)), adapter_table(result))
    if len(result.summary.per_tenant) > 1:
        yield page.section("Tenants", measures_table("tenant", result.summary.per_tenant))
    yield page.section("What ran", _settings(result))


def subtitle(result: LoadResult) -> str:
    server = result.server
    version = f" {server.version}" if server.version else ""
    return (
        f"{server.url}{version}, model {server.model}; {len(result.requests)} requests in {result.seconds:.1f} s; "
        f"client on {result.machine.get('device', 'an unnamed machine')}"
    )


def _cards(summary: Measures) -> list[tuple[str, str]]:
    shown = [
        ("tokens / s", number(summary.tokens_per_second)),
        ("requests / s", number(summary.requests_per_second)),
        ("goodput / s", number(summary.goodput)),
        ("attainment", f"{summary.attainment:.1%}"),
        ("offered", f"{summary.offered}"),
        ("answered", f"{summary.ok}"),
    ]
    rest = [(what, getattr(summary, what)) for what in ("rejected", "failed", "cancelled")]
    return shown + [(what, f"{count}") for what, count in rest]


def latencies(requests: Iterable[RequestRecord]) -> dict[str, list[float]]:
    """All values in seconds, by name."""
    found: dict[str, list[float]] = {name: [] for name, _ in _LATENCIES}
    for request in requests:
        pairs = (("TTFT", request.ttft), ("TPOT", request.tpot), ("E2E", request.e2e))
        for name, value in pairs:
            if value is not None:
                found[name].append(value)
        found["ITL"] += request.gaps
    return found


def latency_charts(runs: Named) -> Iterable[str]:
    """A chart of distributions for each latency, one curve a run."""
    values = [(name, latencies(windowed(run))) for name, run in runs]
    for kind, meaning in _LATENCIES:
        factor, unit = unit_of_seconds([np.percentile(v[kind], 99) for _, v in values if v[kind]])
        lines = [Line(name, [(factor * x, 100 * y) for x, y in cdf(v[kind])]) for name, v in values]
        slo = {kind: limit for _, run in runs for kind, limit in slo_of(run).items()}
        marks = [Mark(f"SLO {number(factor * slo[kind])} {unit}", x=factor * slo[kind])] if kind in slo else []
        yield line_chart(
            f"{kind}: {meaning}",
            f"{kind}, {unit} (log scale)",
            "share of all, %",
            lines,
            log_x=True,
            y_range=(0, 100),
            marks=marks,
        )


def windowed(result: LoadResult) -> list[RequestRecord]:
    """The requests that the summary is about."""
    start, end = result.summary.window
    return [request for request in result.requests if start <= request.at < end]


def slo_of(result: LoadResult) -> dict[str, float]:
    """Limits in seconds by latency, as far as the run had any."""
    slo = result.workload.get("slo")
    limits = slo if isinstance(slo, Mapping) else {}
    return {
        name.upper(): float(limit) for name, limit in limits.items() if isinstance(limit, int | float) and limit > 0
    }


def latency_table(summary: Measures) -> str:
    rows = [[kind, *_stats(getattr(summary, kind.lower()))] for kind, _ in _LATENCIES]
    return page.table(["latency", "mean", "p50", "p90", "p95", "p99"], rows)


def _stats(stats: Stats | None) -> list[str]:
    return (
        ["-"] * 5 if stats is None else [seconds(v) for v in (stats.mean, stats.p50, stats.p90, stats.p95, stats.p99)]
    )


def seconds(value: float) -> str:
    factor, unit = unit_of_seconds([value])
    return f"{number(factor * value)} {unit}"


def _over_time(result: LoadResult) -> Iterable[str]:
    bins = Bins.over(result.seconds)
    times, weights = token_times(result.requests)
    yield line_chart("Throughput", "time, s", "tokens / s", [Line("tokens that came", bins.rate(times, weights))])
    states = [Line("offered", bins.rate([r.at for r in result.requests]))]
    for status, word in (
        ("ok", "answered"),
        ("rejected", "rejected"),
        ("failed", "failed"),
        ("cancelled", "cancelled"),
    ):
        ends = [r.sent if r.ends is None else r.ends for r in result.requests if r.status == status]
        states += [Line(word, bins.rate(ends))] if ends else []
    yield line_chart("Requests", "time, s", "requests / s", states)
    yield from gauge_charts(result)


def _heats(result: LoadResult) -> Iterable[str]:
    ranked = by_popularity(result.requests)
    bins = Bins.over(result.seconds)
    tokens, waits = list[HeatRow](), list[HeatRow]()
    for places in groups(len(ranked)):
        members = [request for place in places for request in ranked[place][1]]
        one = len(places) == 1
        name = ranked[places[0]][0] if one else f"{places[0] + 1} to {places[-1] + 1} by requests"
        rate = bins.of(*token_times(members)) / bins.width
        tokens.append(HeatRow(name, [value or None for value in rate.tolist()]))
        waits.append(HeatRow(name, _mean_waits(members, bins)))
    yield heat("Tokens per second of each adapter", "tokens / s", tokens, result.seconds)
    yield heat("Mean TTFT of each adapter, by when requests were sent", "s", waits, result.seconds)


def _mean_waits(requests: Sequence[RequestRecord], bins: Bins) -> list[float | None]:
    known = [(request.sent, request.ttft) for request in requests if request.ttft is not None]
    count = bins.of([sent for sent, _ in known])
    total = bins.of([sent for sent, _ in known], [wait for _, wait in known])
    return [t / n if n else None for t, n in zip(total.tolist(), count.tolist(), strict=True)]


def _popularity(result: LoadResult) -> str:
    ranked = by_popularity(result.requests)
    points = [(place + 1.0, float(len(requests))) for place, (_, requests) in enumerate(ranked)]
    return line_chart(
        "How often adapters were asked for",
        "adapters by number of requests (log scale)",
        "requests",
        [Line("requests", points)],
        log_x=True,
    )


def adapter_table(result: LoadResult) -> str:
    """Those asked for most; where there are more, also those that waited longest."""
    measures = result.summary.per_adapter
    busiest = sorted(measures, key=lambda name: (-measures[name].offered, name))
    if len(busiest) <= _IN_TABLE:
        return measures_table("adapter", {name: measures[name] for name in busiest})
    slowest = sorted(measures, key=lambda name: -_median_wait(measures[name]))
    return (
        page.note(f"The {_IN_TABLE} of {len(busiest)} adapters that were asked for most:")
        + measures_table("adapter", {name: measures[name] for name in busiest[:_IN_TABLE]})
        + page.note("The ten that waited longest, by median TTFT:")
        + measures_table("adapter", {name: measures[name] for name in slowest[:10]})
    )


def _median_wait(one: Measures) -> float:
    return 0.0 if one.ttft is None else one.ttft.p50


def measures_table(what: str, measures: Mapping[str, Measures]) -> str:
    columns = [
        what,
        "offered",
        "answered",
        "rejected",
        "failed",
        "tokens/s",
        "attainment",
        "TTFT p50",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
    ]
    return page.table(columns, [_measures_row(name or "(none)", one) for name, one in measures.items()])


def _measures_row(name: str, one: Measures) -> list[str]:
    counts = [str(n) for n in (one.offered, one.ok, one.rejected, one.failed)]
    times = [seconds(v) if s else "-" for s in (one.ttft, one.itl) for v in ((s.p50, s.p99) if s else (0.0, 0.0))]
    return [name, *counts, number(one.tokens_per_second), f"{one.attainment:.1%}", *times]


def _settings(result: LoadResult) -> str:
    client = result.client
    rows = [[f"workload: {key}", _plain(value)] for key, value in result.workload.items()]
    rows += [[f"machine: {key}", _plain(value)] for key, value in result.machine.items()]
    rows += [
        ["client: event loop's lag, p99 and longest", f"{seconds(client.lag_p99)}, {seconds(client.lag_max)}"],
        ["client: sent late, p99 and longest", f"{seconds(client.late_p99)}, {seconds(client.late_max)}"],
        ["client: cores, processes", f"{client.cpu:.2f}, {client.processes}"],
    ]
    return page.table(["setting", "value"], rows, words=True)


def _plain(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
