"""Charts as inline SVG of our own: lines over an axis, bars of named things. Colours are CSS variables of the page.

A legend stands above the plot, where it cannot cover a curve; axis labels carry the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from onebase.bench.reports.scale import Scale, number

COLOURS = 6  # --c0 to --c5 of the page's style; what comes after them begins again, dashed
WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _BOTTOM, _ROW, _BAR_ROW = 64, 16, 46, 18, 40
_LETTER = 7.0  # width of a letter at the legend's size


@dataclass(frozen=True, slots=True)
class Line:
    """points: (x, y) in order of x. stepped: each y holds until the next x."""

    name: str
    points: Sequence[tuple[float, float]]
    stepped: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across the whole plot at ``y`` or ``x``, with a word beside it."""

    text: str
    x: float | None = None
    y: float | None = None


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """An SVG element; a note in its place where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="none">Nothing was measured.</p></figure>'
    legend, top = _legend(lines)
    x = _x_scale(lines, marks, log_x)
    y = _y_scale(lines, marks, y_range, top)
    parts = [_grid(x, y, x_label, y_label), *(_mark(mark, x, y) for mark in marks)]
    parts += [_path(line, place, x, y) for place, line in enumerate(lines)]
    return _figure(title, legend + "".join(parts))


def _figure(title: str, body: str, height: float = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
    return f"<figure><figcaption>{escape(title)}</figcaption>{head}{body}</svg></figure>"


def _x_scale(lines: Sequence[Line], marks: Sequence[Mark], log: bool) -> Scale:
    values = [x for line in lines for x, _ in line.points] + [mark.x for mark in marks if mark.x is not None]
    if log:
        positive = [value for value in values if value > 0] or [1e-3]
        low, high = min(positive), max(positive)
        return Scale(low / 1.05, high * 1.05 if high > low else high * 2, _LEFT, WIDTH - _RIGHT, log=True)
    low, high = min(0.0, *values), max(values)
    return Scale(low, high if high > low else low + 1, _LEFT, WIDTH - _RIGHT)


def _y_scale(lines: Sequence[Line], marks: Sequence[Mark], span: tuple[float, float] | None, top: float) -> Scale:
    if span is None:
        values = [y for line in lines for _, y in line.points] + [mark.y for mark in marks if mark.y is not None]
        low, high = min(0.0, *values), max(values)
        span = (low, low + 1.08 * (high - low) if high > low else low + 1)
    return Scale(*span, HEIGHT - _BOTTOM, top)


def _grid(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    parts = []
    for tick in y.ticks(5):
        parts.append(f'<path class="grid" d="M{x.start:g} {y(tick):.1f}H{x.end:g}"/>')
        parts.append(f'<text x="{x.start - 6:g}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks(8):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {y.start:g}V{y.end:g}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{y.start + 16:g}" text-anchor="middle">{number(tick)}</text>')
    middle = (y.start + y.end) / 2
    parts.append(
        f'<text class="label" x="{(x.start + x.end) / 2:g}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    parts.append(
        f'<text class="label" transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    parts.append(f'<path class="axis" d="M{x.start:g} {y.end:g}V{y.start:g}H{x.end:g}"/>')
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> tuple[str, float]:
    """(its SVG, where the plot may begin). Rows wrap at the chart's width."""
    parts, at, row = list[str](), float(_LEFT), 0
    for place, line in enumerate(lines):
        name = line.name if len(line.name) <= 60 else f"{line.name[:57]}..."
        width = 30 + _LETTER * len(name)
        if at + width > WIDTH - _RIGHT and at > _LEFT:
            at, row = float(_LEFT), row + 1
        y = 12 + row * _ROW
        parts.append(f'<path class="line" d="M{at:g} {y - 4}h18" {_stroke(place)}/>')
        parts.append(f'<text x="{at + 23:g}" y="{y}">{escape(name)}</text>')
        at += width
    return "".join(parts), 12 + (row + 1) * _ROW


def _path(line: Line, place: int, x: Scale, y: Scale) -> str:
    commands = []
    before = ""
    for number_, (at, value) in enumerate(line.points):
        here = f"{x(at):.1f}"
        if line.stepped and number_:
            commands.append(f"H{here}")
        commands.append(f"{'L' if number_ else 'M'}{here} {y(value):.1f}")
        before = here
    if len(line.points) == 1:
        commands.append(f"M{before} {y(line.points[0][1]):.1f}h0.1")
    return f'<path class="line" d="{"".join(commands)}" {_stroke(place)}/>'


def _stroke(place: int) -> str:
    dashes = ("", "6 3", "2 3", "8 3 2 3")[place // COLOURS % 4]
    return f'style="stroke:var(--c{place % COLOURS})"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _mark(mark: Mark, x: Scale, y: Scale) -> str:
    if mark.y is not None:
        at = y(mark.y)
        text = f'<text class="mark" x="{x.end - 4:g}" y="{at - 4:.1f}" text-anchor="end">{escape(mark.text)}</text>'
        return f'<path class="marked" d="M{x.start:g} {at:.1f}H{x.end:g}"/>{text}'
    at = x(mark.x or 0.0)
    anchor, shift = ("end", -4) if at > (x.start + x.end) / 2 else ("start", 4)
    place = f'x="{at + shift:.1f}" y="{y.start - 6:.1f}" text-anchor="{anchor}"'
    text = f'<text class="mark" {place}>{escape(mark.text)}</text>'
    return f'<path class="marked" d="M{at:.1f} {y.start:g}V{y.end:g}"/>{text}'


@dataclass(frozen=True, slots=True)
class Bar:
    """value: its length; text: what stands behind it; spread: the lowest and highest round, drawn as a whisker."""

    name: str
    value: float
    text: str
    spread: tuple[float, float] | None = None


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars, from zero; names stand above them, so that they may be long."""
    top = max((max(bar.value, *(bar.spread or (0.0,))) for bar in bars), default=0.0)
    scale = Scale(0.0, top or 1.0, 4, WIDTH - 150)
    parts = [_bar(bar, place, scale) for place, bar in enumerate(bars)]
    return _figure(title, "".join(parts), max(_BAR_ROW * len(bars), 20))


def _bar(bar: Bar, place: int, scale: Scale) -> str:
    y, end = place * _BAR_ROW, scale(bar.value)
    parts = [
        f'<text x="4" y="{y + 13}">{escape(bar.name)}</text>',
        f'<rect x="4" y="{y + 18}" width="{max(end - 4, 1):.1f}" height="14" style="fill:var(--c{place % COLOURS})"/>',
    ]
    if bar.spread is not None:
        low, high = (scale(value) for value in bar.spread)
        ends = f"M{low:.1f} {y + 21}v8M{high:.1f} {y + 21}v8"
        parts.append(f'<path class="whisker" d="M{low:.1f} {y + 25}H{high:.1f}{ends}"/>')
        end = max(end, high)
    return "".join(parts) + f'<text x="{end + 8:.1f}" y="{y + 29}">{escape(bar.text)}</text>'
