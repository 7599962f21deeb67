"""Markdown: a summary of each result, short enough to paste into an issue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onebase.bench.load import result as load
from onebase.bench.reports.compare import Comparison
from onebase.bench.reports.compare_page import COLUMNS, cells, headline
from onebase.bench.reports.figures import figures
from onebase.bench.reports.load_page import seconds, subtitle
from onebase.bench.reports.scale import number
from onebase.bench.reports.stored import Stored, parts


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def summary(stored: Stored) -> str:
    """Of any result."""
    if stored.benchmark == load.NAME:
        return _load(stored)
    if "parts" in stored.data:
        return f"# {stored.name}\n\n" + "\n".join(summary(part) for part in parts(stored).values())
    rows = [[figure.name, str(figure)] for figure in figures(stored)]
    return f"# {stored.benchmark}: {stored.name}\n\n{stored.where}\n\n{table(['figure', 'median (range)'], rows)}"


def _load(stored: Stored) -> str:
    run = stored.load()
    one = run.summary
    rows = [
        ["tokens / s", number(one.tokens_per_second)],
        ["requests / s", number(one.requests_per_second)],
        ["goodput, requests / s", number(one.goodput)],
        ["attainment", f"{one.attainment:.1%}"],
        ["offered, answered", f"{one.offered}, {one.ok}"],
        ["rejected, failed, cancelled", f"{one.rejected}, {one.failed}, {one.cancelled}"],
    ]
    for name, stats in (("TTFT", one.ttft), ("TPOT", one.tpot), ("ITL", one.itl), ("E2E", one.e2e)):
        if stats is not None:
            shown = ", ".join(seconds(value) for value in (stats.mean, stats.p50, stats.p90, stats.p99))
            rows.append([f"{name}: mean, p50, p90, p99", shown])
    warnings = "".join(f"\nNot to be trusted: {text}\n" for text in run.client.warnings)
    return f"# Load: {stored.name}\n\n{subtitle(run)}\n{warnings}\n{table(['figure', 'value'], rows)}"


def comparison(found: Comparison) -> str:
    notes = "".join(f"- {text}\n" for text in found.notes)
    return f"# {headline(found)}\n\n{notes}\n{table(COLUMNS, [cells(row) for row in found.rows])}"
