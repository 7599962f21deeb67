"""KV pages: who holds which. The tensors live in the attention context; this is the book.

A page is free, held (by one sequence or, when its content is a prefix of several, by more), or idle: nobody holds it,
but the prefix cache can still find it. Idle pages count as free and are given away last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onebase.serve.engine.prefix_cache import Block, PrefixCache


class PageAllocator:
    """Hands out page numbers 0..num_pages-1. Without a prefix cache no page is ever shared or idle."""

    def __init__(self, num_pages: int, page_size: int, cache: PrefixCache | None = None) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.cache = cache
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders: dict[int, int] = {}

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
        pages = [self._take_one() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back, in the order of a sequence. The last becomes idle first: a page's children go before it."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if self.cache is None or not self.cache.leave(page):
                    self._free.append(page)

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
        idle = 0 if self.cache is None else sum(map(self.cache.is_idle, found))
        return count - len(found) <= self.num_free - idle

    def share(self, pages: Iterable[int]) -> None:
        """Hold cached pages."""
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            if self.cache is not None:
                self.cache.take(page)

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Prove free + held + idle = total, no page in two states, and as many holders as there are in ``held``: the
        pages of every sequence. Raises RuntimeError where it does not hold."""
        counted: dict[int, int] = {}
        for page in (page for pages in held for page in pages):
            counted[page] = counted.get(page, 0) + 1
        if counted != self._holders:
            raise RuntimeError(f"pages: sequences hold {sum(counted.values())}, counted {sum(self._holders.values())}")
        distinct = {*self._free, *self._holders}
        idle = {page for page in range(self.num_pages) if self.cache is not None and self.cache.is_idle(page)}
        total = len(self._free) + len(self._holders) + self.num_idle
        if total != self.num_pages or len(distinct | idle) != self.num_pages:
            raise RuntimeError(
                f"pages: {len(self._free)} free + {len(self._holders)} held + {self.num_idle} idle of {self.num_pages}"
            )
        if self.cache is not None:
            self.cache.check()

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        assert self.cache is not None  # num_free counted its idle pages
        return self.cache.evict()
