"""What sequences share by the prefix cache: pages that are computed, and those that one of them is computing.

Requests that begin alike may arrive together. A block that a running sequence is about to compute is led by it; a
waiting one whose next blocks are led waits for the last of them, and comes back when it is computed, or when its leader
stops running. Leaders run, and wait for nobody; so nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import Block
from onebase.serve.engine.sequence import Sequence

WORTH_WAITING = 4  # for a leader that computes one in so many of a sequence's tokens, or more


class Prefixes:
    """Who leads which blocks, by key, and who follows. Without a prefix cache nobody does."""

    def __init__(self, pages: PageAllocator) -> None:
        self._pages = pages
        self._leads: dict[Sequence, dict[bytes, None]] = {}
        self._leader: dict[bytes, Sequence] = {}
        self._followers: dict[bytes, dict[Sequence, None]] = {}
        self._follows: dict[Sequence, bytes] = {}

    def cached(self, sequence: Sequence) -> list[int]:
        """The pages that the prefix cache has for it. Nothing is taken."""
        return self._pages.find(self._blocks(sequence, 0))

    def lead(self, sequence: Sequence) -> None:
        """It starts, on the pages that it has: the blocks that it fills are not computed by others meanwhile. Those
        that are led already stay with their leader."""
        size = self._pages.page_size
        full = range(len(sequence.pages), len(sequence.tokens) // size if self._is_caching(sequence) else 0)
        keys = [sequence.block(index, size).key for index in full]
        mine = {key: None for key in keys if key not in self._leader}
        if mine:
            self._leads[sequence] = mine
            self._leader.update(dict.fromkeys(mine, sequence))

    def follow(self, sequence: Sequence) -> bool:
        """Whether it has to wait: a running one is computing a good part of what it needs."""
        led: list[bytes] = []
        for block in self._blocks(sequence, len(self.cached(sequence))) if self._leader else ():
            if block.key not in self._leader:
                break
            led.append(block.key)
        if WORTH_WAITING * len(led) * self._pages.page_size < len(sequence.tokens):
            return False
        self._followers.setdefault(led[-1], {})[sequence] = None
        self._follows[sequence] = led[-1]
        return True

    def computed(self, sequence: Sequence) -> list[Sequence]:
        """More of its slots are in its pages. Who waited for a block that is full now."""
        if self._pages.cache is None:
            return []
        released: list[Sequence] = []
        full = sequence.num_computed // self._pages.page_size
        for index in range(sequence.num_filed, full):
            block = sequence.block(index, self._pages.page_size)
            self._pages.cache.add(sequence.pages[index], block)
            self._forget(block.key)
            released += self._let_go(block.key)
        sequence.num_filed = full
        return released

    def stop(self, sequence: Sequence) -> list[Sequence]:
        """It runs no longer, or waits no longer. Who waited for what it did not compute."""
        key = self._follows.pop(sequence, None)
        if key is not None:
            del self._followers[key][sequence]
        left: list[Sequence] = []
        for led in list(self._leads.get(sequence, ())):
            self._forget(led)
            left += self._let_go(led)
        return left

    def _is_caching(self, sequence: Sequence) -> bool:
        return self._pages.cache is not None and sequence.layout is not None

    def _blocks(self, sequence: Sequence, first: int) -> Iterator[Block]:
        """Its blocks that others may have computed, from this one on."""
        size = self._pages.page_size
        most = sequence.num_reusable // size if self._is_caching(sequence) else 0
        return (sequence.block(index, size) for index in range(first, most))

    def _forget(self, key: bytes) -> None:
        leader = self._leader.pop(key, None)
        if leader is not None:
            del self._leads[leader][key]
            if not self._leads[leader]:
                del self._leads[leader]

    def _let_go(self, key: bytes) -> Collection[Sequence]:
        followers = self._followers.pop(key, {})
        for follower in followers:
            del self._follows[follower]
        return followers.keys()

    def check(self, running: Collection[Sequence], aside: Collection[Sequence]) -> None:
        """Prove that leaders run, and that who is set aside follows one. Raises RuntimeError where not."""
        if not self._leads.keys() <= set(running) or sum(map(len, self._leads.values())) != len(self._leader):
            raise RuntimeError("shared prefixes: a leader does not run, or leads what it does not know of")
        if set(aside) != self._follows.keys() or not set(self._follows.values()) <= self._leader.keys():
            raise RuntimeError(f"shared prefixes: {len(aside)} are set aside, {len(self._follows)} follow")
