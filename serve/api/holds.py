"""Which contents requests hold, and which are to leave the device with the last of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Holds:
    """Counts holds by digest. A digest is retired once no name means it; used from the event loop alone."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._retired: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        """Whether somebody holds it."""
        return digest in self._held

    def take(self, digest: str) -> None:
        self._held[digest] += 1

    def give_back(self, digest: str) -> bool:
        """Whether the content is to leave now: it was retired, and this was its last hold."""
        self._held[digest] -= 1
        if self._held[digest]:
            return False
        del self._held[digest]
        leaves = digest in self._retired
        self._retired.discard(digest)
        return leaves

    def retire(self, digests: Iterable[str]) -> list[str]:
        """Those of them that nobody holds, and that can leave now. The others leave with their last hold."""
        wanted = set(digests)
        self._retired |= wanted & self._held.keys()
        return sorted(wanted - self._held.keys())

    def revive(self, digests: Iterable[str]) -> None:
        """A name means them again."""
        self._retired.difference_update(digests)
