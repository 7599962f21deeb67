"""Two results of one benchmark: what differs beyond noise. The first is what the second is measured by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onebase.bench.load import result as load
from onebase.bench.reports import compare_load
from onebase.bench.reports.figures import figures
from onebase.bench.reports.stored import NotStored, Stored, parts, same_benchmark
from onebase.bench.reports.verdict import Row, row_of_figures


@dataclass(frozen=True, slots=True)
class Comparison:
    """notes: what makes the two hard to compare, and how the verdicts were reached."""

    first: Stored
    second: Stored
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(first: Stored, second: Stored) -> Comparison:
    """Raises NotStored where they are of different benchmarks."""
    same_benchmark(first, second)
    rows = tuple(_rows(first, second))
    if not rows:
        raise NotStored(f"{first.name} and {second.name} have no figure in common")
    return Comparison(first, second, rows, (*_differences(first, second), *_method(first)))


def _rows(first: Stored, second: Stored) -> Iterator[Row]:
    if first.benchmark == load.NAME:
        yield from compare_load.load_rows(first.load(), second.load())
    elif "parts" in first.data:
        yield from _part_rows(parts(first), parts(second))
    else:
        others = {figure.name: figure for figure in figures(second)}
        yield from (row_of_figures(one, others[one.name]) for one in figures(first) if one.name in others)


def _part_rows(first: Mapping[str, Stored], second: Mapping[str, Stored]) -> Iterator[Row]:
    for name in first:
        if name in second:
            same_benchmark(first[name], second[name])
            yield from (replace(row, name=f"{name}: {row.name}") for row in _rows(first[name], second[name]))


def _differences(first: Stored, second: Stored) -> Iterator[str]:
    """Settings and machines that are not the same."""
    for name in ("machine", "workload", "plan", "load", "case", "shape"):
        one, other = _settings(first, name), _settings(second, name)
        changed = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        shown = [f"{key} ({one.get(key)} and {other.get(key)})" for key in changed]
        if shown:
            yield f"Not the same {name}: {', '.join(shown)}."


def _settings(stored: Stored, name: str) -> Mapping[str, Any]:
    value = stored.data.get(name, {})
    return value if isinstance(value, Mapping) else {name: value}


def _method(stored: Stored) -> Iterator[str]:
    if stored.benchmark == load.NAME or "parts" in stored.data:
        yield compare_load.METHOD
    if stored.benchmark != load.NAME:
        yield (
            "Rounds: exact two-sided rank-sum test at 5 %; it needs four rounds a side. With fewer, ranges that lie "
            "apart are named, no more."
        )
