"""KV pages: who holds which. The tensors live in the attention context; this is the book.

A page is free, held (by one sequence or, when its content is a prefix of several, by more), or idle: nobody holds it,
but the prefix cache can still find it. Idle pages count as free and are given away last.

Pages are numbered by their slots in the device's buffer, whose low end belongs to adapters. The border between them
moves: pages are handed out from the high end, so that those next to it are mostly free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from onebase.serve.engine.prefix_cache import Block, PrefixCache


class PageAllocator:
    """Hands out page numbers from ``first`` up. Without a prefix cache no page is ever shared or idle."""

    def __init__(self, num_pages: int, page_size: int, cache: PrefixCache | None = None, first: int = 0) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.cache = cache
        self.first = first
        self._free = list(range(1 - first - num_pages, 1 - first))  # a heap of negated numbers: the highest comes first
        self._holders: dict[int, int] = {}

    @property
    def num_unused(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: free and idle ones."""
        return len(self._free) + self.num_idle

    @property
    def num_idle(self) -> int:
        return 0 if self.cache is None else self.cache.num_idle

    @property
    def num_evicted(self) -> int:
        """Cached pages that were given away, since the start."""
        return 0 if self.cache is None else self.cache.evictions

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or None (and nothing taken) where there are not as many."""
        if count > self.num_free:
            return None
        pages = sorted(self._take_one() for _ in range(count))  # memory is read faster upwards
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back, in the order of a sequence. The last becomes idle first: a page's children go before it."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if self.cache is None or not self.cache.leave(page):
                    heappush(self._free, -page)

    def find(self, blocks: Iterable[Block]) -> list[int]:
        """The cached pages of the first blocks, up to the first that is not cached. Nothing is taken."""
        pages: list[int] = []
        for block in blocks:
            page = None if self.cache is None else self.cache.find(block)
            if page is None:
                break
            pages.append(page)
        return pages

    def can_hold(self, count: int, found: Sequence[int]) -> bool:
        """Whether ``count`` pages could be held together, ``found`` (of ``find``) among them."""
        return self.lacking(count, found) <= 0

    def lacking(self, count: int, found: Sequence[int]) -> int:
        """Free pages that are missing for that."""
        idle = 0 if self.cache is None else sum(map(self.cache.is_idle, found))
        return count - len(found) - (self.num_free - idle)

    def share(self, pages: Iterable[int]) -> None:
        """Hold cached pages."""
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            if self.cache is not None:
                self.cache.take(page)

    def add(self, count: int) -> None:
        """The ``count`` slots below the first page are pages now."""
        self.first -= count
        self.num_pages += count
        for page in range(self.first, self.first + count):
            heappush(self._free, -page)

    def withdraw(self, count: int, most_moves: int) -> dict[int, int]:
        """Give up the lowest pages: ``count`` of them, or as many as leave no more than ``most_moves`` to be copied. At
        least ``count`` must be free; of the idle ones those go that have been idle longest.

        What is still held or cached there gets another page, old -> new: to be copied before anybody reads it, and to
        be renamed by the sequences that hold it."""
        count, used = self._reachable(count, most_moves)
        border = self.first + count
        targets = [-item for item in self._free if -item >= border]
        while len(targets) < len(used):
            assert self.cache is not None  # only idle pages are free and not unused
            evicted = self.cache.evict()
            if evicted < border:
                used.remove(evicted)
            else:
                targets.append(evicted)
        moves = dict(zip(used, sorted(targets, reverse=True), strict=False))
        self._rename(moves, targets)
        self.first, self.num_pages = border, self.num_pages - count
        return moves

    def _reachable(self, count: int, most_moves: int) -> tuple[int, list[int]]:
        """How many of the lowest ``count`` pages can go, and those of them that are held or idle."""
        unused, used = {-item for item in self._free}, list[int]()
        for page in range(self.first, self.first + count):
            if page not in unused:
                if len(used) == most_moves:
                    return page - self.first, used
                used.append(page)
        return count, used

    def _rename(self, moves: dict[int, int], targets: Iterable[int]) -> None:
        """targets: the free pages that are left, those of ``moves`` among them."""
        self._free = [-page for page in set(targets) - set(moves.values())]
        heapify(self._free)
        if not moves:
            return
        self._holders = {moves.get(page, page): count for page, count in self._holders.items()}
        if self.cache is not None:
            self.cache.rename(moves)

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Prove free + held + idle = total, no page in two states, and as many holders as there are in ``held``: the
        pages of every sequence. Raises RuntimeError where it does not hold."""
        counted: dict[int, int] = {}
        for page in (page for pages in held for page in pages):
            counted[page] = counted.get(page, 0) + 1
        if counted != self._holders:
            raise RuntimeError(f"pages: sequences hold {sum(counted.values())}, counted {sum(self._holders.values())}")
        pages = set(range(self.first, self.first + self.num_pages))
        idle = {page for page in pages if self.cache is not None and self.cache.is_idle(page)}
        known = {*(-item for item in self._free), *self._holders, *idle}
        total = len(self._free) + len(self._holders) + self.num_idle
        if total != self.num_pages or known != pages:
            raise RuntimeError(
                f"pages: {len(self._free)} free + {len(self._holders)} held + {self.num_idle} idle of {self.num_pages}"
            )
        if self.cache is not None:
            self.cache.check()

    def _take_one(self) -> int:
        if self._free:
            return -heappop(self._free)
        assert self.cache is not None  # num_free counted its idle pages
        return self.cache.evict()
