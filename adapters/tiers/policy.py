"""Who is evicted: the adapter with the least recency-weighted frequency of use (LRFU: Lee et al., 2001).

A use counts 1 and loses half of that with every ``half_life`` further uses of any adapter. Half-life 1 is nearly LRU,
an endless one is LFU. Scores are kept as if nothing ever decayed, in log2, with later uses counting more instead: the
order is the same, and stands without being aged.

    score = log2(sum over uses of 2 ** (time of the use / half_life)),    time: the number of the use

Both tiers ask the same book, so what host memory still knows of an adapter counts when it comes to the device.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator

# Of those tried, the longest that had no fewer hits than LRU on any load: docs/decisions.md.
HALF_LIFE = 500


class Lrfu:
    """Scores of adapters by digest. Used by the engine's thread."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._uses = 0
        self._scores: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._scores)

    def use(self, digest: str) -> None:
        """It was used now."""
        self._uses += 1
        now = self._uses / self._half_life
        before = self._scores.get(digest)
        self._scores[digest] = now if before is None else now + math.log2(1.0 + 2.0 ** (before - now))

    def know(self, digest: str) -> None:
        """It came without having been used: it counts as if it had been used once, now."""
        if digest not in self._scores:
            self.use(digest)

    def coldest(self, digests: Iterable[str]) -> str | None:
        """Who has to go first of these; None where there are none."""
        return min(digests, key=self._score, default=None)

    def coldest_first(self, digests: Iterable[str]) -> Iterator[str]:
        """All of these, in the order in which they have to go. Each score is looked at once; who stops early does not
        pay for the order of the rest."""
        heap = [(self._score(digest), at, digest) for at, digest in enumerate(digests)]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[2]

    def forget(self, digest: str) -> None:
        """It is in no tier any more."""
        self._scores.pop(digest, None)

    def _score(self, digest: str) -> float:
        return self._scores.get(digest, -math.inf)
