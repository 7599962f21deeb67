"""Prefix cache: pages that are full stay findable by what they hold, until their room is needed.

What a page holds follows from its tokens, from everything before it, and from the adapters that acted on its rows. A
block says that; its key chains over its parents' keys, so that equal keys mean equal pages. A chain's root is its
tenant's, and its salt's: tenants share no pages, so none finds out by the clock what another one sent. The base's
rows have an empty activation whoever asks: a tenant's requests over different activated LoRAs share the pages before
their invocations.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROOT = b""

# (digest, scale, rows of the page from and up to which it acts, whether as at the end of its window), sorted.
Activation = tuple[tuple[str, float, int, int, bool], ...]


def root_of(tenant: str, salt: str) -> bytes:
    """The key that stands before the first block of a chain."""
    return hashlib.blake2b(repr((tenant, salt)).encode(), digest_size=16).digest() if tenant or salt else ROOT


@dataclass(frozen=True, slots=True)
class Block:
    """The content of one full page. key: of it and all before it; parent: of the page before, or its root."""

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]
    activation: Activation

    @classmethod
    def of(cls, parent: bytes, tokens: Sequence[int], activation: Activation) -> Block:
        """Keys are cryptographic digests: clients choose tokens and must not be able to meet another one's page."""
        digest = hashlib.blake2b(parent, digest_size=16)
        digest.update(array("q", tokens).tobytes())
        digest.update(repr(activation).encode())
        return cls(digest.digest(), parent, tuple(tokens), activation)


class PrefixCache:
    """The book of cached pages. Idle ones (nobody holds them) are evicted in the order in which they became idle."""

    def __init__(self) -> None:
        self.evictions = 0
        self._pages: dict[bytes, int] = {}
        self._blocks: dict[int, Block] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, block: Block) -> int | None:
        """The page that holds the block; its tokens and activation are compared again."""
        page = self._pages.get(block.key)
        return page if page is not None and self._blocks[page] == block else None

    def add(self, page: int, block: Block) -> None:
        """A held page is full now. Where another one holds the same already, that one stays the cached one."""
        if block.key not in self._pages:
            self._pages[block.key] = page
            self._blocks[page] = block

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def leave(self, page: int) -> bool:
        """Nobody holds the page any more. False where it is not cached, and so is free."""
        if page not in self._blocks:
            return False
        self._idle[page] = None
        return True

    def take(self, page: int) -> None:
        """Somebody holds a cached page; it may have been idle."""
        self._idle.pop(page, None)

    def evict(self) -> int:
        """Forget the page that has been idle longest, and give it away. KeyError where none is idle."""
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._blocks.pop(page).key]
        self.evictions += 1
        return page

    def rename(self, moves: Mapping[int, int]) -> None:
        """The contents of these pages lie in others now: old -> new."""
        self._blocks = {moves.get(page, page): block for page, block in self._blocks.items()}
        self._pages = {block.key: page for page, block in self._blocks.items()}
        self._idle = OrderedDict((moves.get(page, page), None) for page in self._idle)

    def check(self) -> None:
        """Raises RuntimeError unless keys and pages agree one to one, and every idle page is cached."""
        if {key: page for page, block in self._blocks.items() for key in [block.key]} != self._pages:
            raise RuntimeError(f"prefix cache: {len(self._pages)} keys do not match {len(self._blocks)} pages")
        if not self._blocks.keys() >= self._idle.keys():
            raise RuntimeError("prefix cache: a page is idle and not cached")
