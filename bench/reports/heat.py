"""Adapters over time as a grid of cells: what each got, or how long it waited. A row is an adapter, or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from onebase.bench.reports.chart import WIDTH
from onebase.bench.reports.scale import Scale, number

ROWS = 40  # more adapters than that are shown in groups of neighbours in popularity
_WIDE, _NAMES, _ROW, _TOP = 2 * WIDTH, 190, 15, 34


@dataclass(frozen=True, slots=True)
class HeatRow:
    """values: one a stretch of time; None: nothing happened."""

    name: str
    values: Sequence[float | None]


def groups(count: int) -> list[range]:
    """Places 0 to count - 1 in at most ROWS rows: as many neighbours in each, but for the last one."""
    size = -(-count // ROWS)
    return [range(first, min(first + size, count)) for first in range(0, count, size or 1)]


def heat(title: str, unit: str, rows: Sequence[HeatRow], seconds: float) -> str:
    """An SVG element as wide as the page; strength of colour is the value's share of the largest one's root."""
    values = [value for row in rows for value in row.values if value is not None]
    top = max(values, default=0.0) or 1.0
    height = _TOP + len(rows) * _ROW + 40
    x = Scale(0.0, seconds, _NAMES, _WIDE - 16)
    parts = [_legend(unit, top)]
    parts += [_row(row, _TOP + place * _ROW, x, top) for place, row in enumerate(rows)]
    bottom = _TOP + len(rows) * _ROW
    parts += [
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>' for tick in x.ticks(10)
    ]
    parts.append(
        f'<text class="label" x="{(x.start + x.end) / 2:g}" y="{bottom + 34}" text-anchor="middle">time, s</text>'
    )
    head = f'<svg viewBox="0 0 {_WIDE} {height}" role="img" aria-label="{escape(title)}">'
    return f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{head}{"".join(parts)}</svg></figure>'


def _strength(value: float, top: float) -> float:
    return 0.08 + 0.92 * math.sqrt(max(value, 0.0) / top)


def _legend(unit: str, top: float) -> str:
    shares = [step / 10 for step in range(11)]
    cells = "".join(
        f'<rect x="{_NAMES + 24 + 14 * place}" y="4" width="14" height="12" style="fill:var(--heat)" '
        f'fill-opacity="{_strength(share * top, top):.2f}"/>'
        for place, share in enumerate(shares)
    )
    end = _NAMES + 24 + 14 * len(shares) + 8
    return f'<text x="{_NAMES}" y="14">0</text>{cells}<text x="{end}" y="14">{number(top)} {escape(unit)}</text>'


def _row(row: HeatRow, y: float, x: Scale, top: float) -> str:
    name = row.name if len(row.name) <= 26 else f"{row.name[:25]}…"
    width = (x.end - x.start) / max(len(row.values), 1)
    cells = [
        f'<rect x="{x.start + place * width:.1f}" y="{y}" width="{width:.2f}" height="{_ROW - 1}" '
        f'style="fill:var(--heat)" fill-opacity="{_strength(value, top):.2f}"/>'
        for place, value in enumerate(row.values)
        if value is not None
    ]
    return f'<text x="{_NAMES - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>{"".join(cells)}'
