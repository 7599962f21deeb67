"""A comparison as a page, as Markdown and as lines of a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from onebase.bench.load import result as load
from onebase.bench.reports import page
from onebase.bench.reports.chart import Line, line_chart
from onebase.bench.reports.compare import Comparison
from onebase.bench.reports.figures_page import sweep_chart
from onebase.bench.reports.load_page import latency_charts
from onebase.bench.reports.series import Bins, token_times
from onebase.bench.reports.verdict import Row

COLUMNS = ("figure", "first", "second", "second / first", "99 % interval", "verdict")


def cells(row: Row) -> list[str]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
    interval = "-" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
    return [row.name, row.first, row.second, ratio, interval, row.verdict]


def headline(comparison: Comparison) -> str:
    """What it amounts to, in a sentence."""
    counts = {kind: sum(row.kind == kind for row in comparison.rows) for kind in ("better", "worse", "changed")}
    told = [f"{count} {kind}" for kind, count in counts.items() if count]
    names = f"{comparison.second.name} beside {comparison.first.name}"
    return f"{names}: {', '.join(told) or 'nothing differs'} beyond noise, of {len(comparison.rows)} figures."


def comparison_page(comparison: Comparison) -> str:
    """The whole document."""
    first, second = comparison.first, comparison.second
    classes = [row.kind for row in comparison.rows]
    sections = [
        page.note(f"first: {first.name}, on {first.where}"),
        page.note(f"second: {second.name}, on {second.where}"),
        *(page.note(text) for text in comparison.notes),
        *_drawn(comparison),
        page.section("What differs", page.table(COLUMNS, [cells(row) for row in comparison.rows], classes)),
    ]
    return page.page(f"{first.benchmark}: {first.name} and {second.name}", headline(comparison), sections)


def _drawn(comparison: Comparison) -> Iterable[str]:
    first, second = comparison.first, comparison.second
    if first.benchmark == load.NAME:
        runs = [(f"first: {first.name}", first.load()), (f"second: {second.name}", second.load())]
        yield page.section("Latencies", page.charts(*latency_charts(runs)))
        yield page.section("Over time", page.charts(_throughput(runs)))
    elif first.benchmark == "sweep":
        yield page.section("Attainment", page.charts(sweep_chart(first, second)))


def _throughput(runs: list[tuple[str, load.LoadResult]]) -> str:
    lines = [Line(name, Bins.over(run.seconds).rate(*token_times(run.requests))) for name, run in runs]
    return line_chart("Throughput", "time, s", "tokens / s", lines)
