"""What any benchmark stored, as named figures: numbers and series of rounds, wherever they lie in its JSON."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onebase.bench.reports.scale import number
from onebase.bench.reports.stored import Stored

Better = Literal["higher", "lower"]
_RUN = {"benchmark", "format", "machine", "server", "client", "seconds", "window", "runs", "refused", "axis"}
_SETTINGS = {"plan", "load", "workload", "case", "rows", "clients", "http", "ranks", "dtype", "shape"}
_RAW = {"requests", "timeline", "churn"}
_PLAIN = {"results", "figures"}  # names that say nothing
_ABOUT = _RUN | _SETTINGS | _RAW
_LOWER = re.compile(
    r"\bms\b|_ms|us_per|ttft|tpot|itl|e2e|\bgap\b|\btime\b|\bseconds\b|latency|, s$| s$|loads|failed|rejected|\bcold\b",
    re.IGNORECASE,
)
_HIGHER = re.compile(r"/s\b|per_second|throughput|goodput|attainment|ours / |\bok\b|highest|faster", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Figure:
    """values: one a round. path: where it lies, outermost first; the last part names it."""

    path: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        return ": ".join(self.path)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def better(self) -> Better | None:
        """By its name; None where that does not tell. What counts is said innermost."""
        for part in reversed(self.path):
            if _LOWER.search(part):
                return "lower"
            if _HIGHER.search(part):
                return "higher"
        return None

    def __str__(self) -> str:
        if len(self.values) == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(min(self.values))} to {number(max(self.values))})"


def figures(stored: Stored) -> list[Figure]:
    """All of them, in the file's order, without what describes the run."""
    return list(_walk((), {key: value for key, value in stored.data.items() if key not in _ABOUT}))


def _walk(path: tuple[str, ...], value: Any) -> Iterator[Figure]:
    if _is_number(value):
        yield Figure(path, (float(value),))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _ABOUT:
                yield from _walk(path if key in _PLAIN else (*path, key), inner)
    elif isinstance(value, list) and value:
        yield from _walk_list(path, value)


def _walk_list(path: tuple[str, ...], items: Sequence[Any]) -> Iterator[Figure]:
    """Numbers are rounds of one figure. Objects are cases, told apart by their whole numbers and words."""
    if all(_is_number(item) for item in items):
        yield Figure(path, tuple(float(item) for item in items))
        return
    for item in items:
        if isinstance(item, Mapping):
            case = ", ".join(f"{key} {value}" for key, value in item.items() if isinstance(value, int | str))
            measured = {key: value for key, value in item.items() if not isinstance(value, int | str)}
            yield from _walk((*path, case) if case else path, measured)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
