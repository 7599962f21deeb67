"""How long the steps of a load take, as histograms."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LoadStep = Literal["read", "compile", "copy", "wait"]


class LoadMeters:
    """Durations in seconds, by step. read: compiled form -> host; compile: files -> host; copy: host -> device; wait:
    from the first request that needed the adapter until it was ready. Used by the engine's thread."""

    def __init__(self) -> None:
        self._counts: dict[LoadStep, list[int]] = {}
        self._totals: dict[LoadStep, float] = {}

    def add(self, step: LoadStep, seconds: float) -> None:
        counts = self._counts.setdefault(step, [0] * (len(LOAD_BUCKETS) + 1))
        counts[bisect_left(LOAD_BUCKETS, seconds)] += 1
        self._totals[step] = self._totals.get(step, 0.0) + seconds

    def histograms(self) -> Mapping[LoadStep, tuple[tuple[int, ...], float]]:
        """step -> (counts by bucket, the last one over all bounds; the sum of seconds)."""
        return {step: (tuple(counts), self._totals[step]) for step, counts in self._counts.items()}
