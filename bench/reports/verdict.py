"""A row of a comparison: one figure of both sides, and what its difference means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from onebase.bench.reports import noise
from onebase.bench.reports.figures import Better, Figure
from onebase.bench.reports.scale import number

Kind = Literal["better", "worse", "changed", "same", "unclear"]
_WORDS = {
    "no difference": "no difference beyond noise",
    "too few": "too few to tell",
    "apart, higher": "too few rounds to tell; the ranges lie apart",
    "apart, lower": "too few rounds to tell; the ranges lie apart",
}


@dataclass(frozen=True, slots=True)
class Row:
    """ratio: second / first; None where the first is zero. interval: of that ratio, where there is one.
    verdict: in words; kind: what it means for who reads it."""

    name: str
    first: str
    second: str
    ratio: float | None
    verdict: str
    kind: Kind
    interval: tuple[float, float] | None = None


def row_of_figures(first: Figure, second: Figure) -> Row:
    """By their rounds."""
    verdict = noise.rounds(first.values, second.values)
    return _row(first.name, (str(first), str(second)), _ratio(first.median, second.median), verdict, first.better)


def row_of_interval(name: str, values: tuple[float, float], interval: noise.Interval | None, better: Better) -> Row:
    """By a bootstrap; none: there was too little to draw from."""
    verdict: noise.Verdict = "too few" if interval is None else interval.verdict
    row = _row(name, (number(values[0]), number(values[1])), _ratio(*values), verdict, better)
    return row if interval is None else replace(row, interval=(interval.low, interval.high))


def _row(name: str, shown: tuple[str, str], ratio: float | None, verdict: noise.Verdict, better: Better | None) -> Row:
    if verdict in _WORDS:
        return Row(name, *shown, ratio, _WORDS[verdict], "same" if verdict == "no difference" else "unclear")
    if better is None:
        return Row(name, *shown, ratio, verdict, "changed")
    kind: Kind = "better" if verdict == better else "worse"
    return Row(name, *shown, ratio, f"{kind} ({verdict})", kind)


def _ratio(first: float, second: float) -> float | None:
    return second / first if first else None
