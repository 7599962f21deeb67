"""KV pages: who holds which. The tensors live in the attention context; this is the book."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0..num_pages-1."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or None (and nothing taken) where there are not as many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._held.remove(page)
            self._free.append(page)

    def check(self) -> None:
        """Prove free + held = total, no page twice. Raises RuntimeError where it does not hold."""
        if len(self._free) + len(self._held) != self.num_pages or self._held.intersection(self._free):
            raise RuntimeError(f"pages: {len(self._free)} free + {len(self._held)} held of {self.num_pages}")
