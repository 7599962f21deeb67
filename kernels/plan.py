"""BatchPlan: which rows of a batch use which adapter program.

It knows nothing of tensors, sites or models. The caller lays the batch out in adapter order, so that a program's
rows are one contiguous run: a segment. Rows of the bare base are in no segment, a row under several adapters is in
several. What a kernel body derives from a plan (tiles, masks, device arrays) is kept on the plan by ``memo``, so a
plan that is kept while the membership stands costs nothing from the second step on.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Uses = tuple[tuple[int, float], ...]
Run = tuple[int, Uses]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, start + length) use program ``handle``, its output multiplied by ``scale``."""

    start: int
    length: int
    handle: int
    scale: float = 1.0

    @property
    def stop(self) -> int:
        return self.start + self.length


class BatchPlan:
    """Segments over ``num_rows`` rows, ordered by start. Immutable but for its memo.

    Equal starts stay as they were given: handles follow from what was loaded first, and sums round by their order.
    """

    __slots__ = ("__weakref__", "_memo", "handles", "num_rows", "segments")

    def __init__(self, num_rows: int, segments: Iterable[Segment] = ()) -> None:
        """Raises ValueError for an empty segment, one outside the rows, a scale that is zero or not finite, or a
        program with two segments over one row."""
        self.num_rows = num_rows
        self.segments = tuple(sorted(segments, key=lambda s: s.start))
        self.handles = frozenset(s.handle for s in self.segments)
        self._memo: dict[Hashable, Any] = {}
        stops: dict[int, int] = {}
        for segment in self.segments:
            _check(segment, num_rows, stops.get(segment.handle, 0))
            stops[segment.handle] = segment.stop

    @classmethod
    def from_rows(cls, uses: Sequence[Uses]) -> BatchPlan:
        """Per row its (handle, scale) uses; rows are already in adapter order."""
        return cls.from_runs([(1, use) for use in uses])

    @classmethod
    def from_runs(cls, runs: Sequence[Run]) -> BatchPlan:
        """Per run of equal rows its length and its (handle, scale) uses.

        Neighbouring runs that share a (handle, scale) share its segment. A handle named twice on a row counts once,
        with the sum of its scales; a scale of zero drops the use. Raises ValueError for a negative length.
        """
        row, segments, started = 0, [], dict[tuple[int, float], int]()
        for length, uses in runs:
            if length < 0:
                raise ValueError(f"runs: a run has {length} rows; allowed is 0 or more")
            if length == 0:
                continue
            wanted = _canonical(uses)
            for use in [use for use in started if use not in wanted]:
                segments.append(_segment(started.pop(use), row, use))
            for use in wanted:
                started.setdefault(use, row)
            row += length
        segments.extend(_segment(start, row, use) for use, start in started.items())
        return cls(row, segments)

    @property
    def is_base(self) -> bool:
        """No row uses any adapter."""
        return not self.segments

    @property
    def layers(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments split so that those of one layer cover a row at most once."""
        return self.memo("layers", lambda: _split_layers(self.segments))

    def memo(self, key: Hashable, build: Callable[[], T]) -> T:
        """What ``build`` returned for this key the first time. The key names the owner and the thing."""
        try:
            found: T = self._memo[key]
        except KeyError:
            found = self._memo[key] = build()
        return found

    def __repr__(self) -> str:
        return f"BatchPlan(num_rows={self.num_rows}, segments={self.segments!r})"


class PlanCache:
    """The latest plans by their runs, so that a step with an unchanged membership reuses its plan and its memo."""

    def __init__(self, capacity: int = 8) -> None:
        self._capacity = capacity
        self._plans: OrderedDict[tuple[Run, ...], BatchPlan] = OrderedDict()

    def from_runs(self, runs: Sequence[Run]) -> BatchPlan:
        """As BatchPlan.from_runs; equal runs give the identical plan while it is among the latest."""
        key = tuple(runs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = BatchPlan.from_runs(key)
        self._plans.move_to_end(key)
        while len(self._plans) > self._capacity:
            self._plans.popitem(last=False)
        return plan


def _check(segment: Segment, num_rows: int, taken: int) -> None:
    if segment.length < 1 or segment.start < 0 or segment.stop > num_rows:
        raise ValueError(f"segments: {segment} is empty or outside the {num_rows} rows of the batch")
    if segment.scale == 0 or not math.isfinite(segment.scale):
        raise ValueError(f"segments: scale of {segment} must be finite and not zero")
    if segment.start < taken:
        raise ValueError(f"segments: {segment} overlaps another of its program")


def _canonical(uses: Uses) -> tuple[tuple[int, float], ...]:
    if len(uses) == 1:
        return uses if uses[0][1] != 0 else ()
    totals: dict[int, float] = {}
    for handle, scale in uses:
        totals[handle] = totals.get(handle, 0.0) + scale
    return tuple((handle, scale) for handle, scale in totals.items() if scale != 0)


def _segment(start: int, stop: int, use: tuple[int, float]) -> Segment:
    return Segment(start, stop - start, *use)


def _split_layers(segments: Sequence[Segment]) -> tuple[tuple[Segment, ...], ...]:
    layers: list[list[Segment]] = []
    for segment in segments:
        free = next((layer for layer in layers if layer[-1].stop <= segment.start), None)
        if free is None:
            layers.append([segment])
        else:
            free.append(segment)
    return tuple(tuple(layer) for layer in layers)
