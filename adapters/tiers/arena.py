"""One device buffer for adapter tensors: exact-size blocks, no slots.

The allocator keeps a sorted list of free ranges and takes the smallest that fits. Offsets and sizes are in elements.
"""

from __future__ import annotations

import bisect
from typing import Protocol

import torch
from torch import Tensor

# 128 bytes of a two-byte type: what a GPU reads at once. Tensors inside a block start at 16-byte borders.
BLOCK_ALIGN = 64


def aligned(n: int, to: int) -> int:
    return -(-n // to) * to


def _whole(num_elements: int) -> int:
    return num_elements // BLOCK_ALIGN * BLOCK_ALIGN


class Neighbour(Protocol):
    """Who shares the device's budget with the arena: the KV pages. Called by the engine's thread, between two steps."""

    @property
    def spare_bytes(self) -> int:
        """What it could give to the arena now."""

    def give(self, nbytes: int, *, cached: bool) -> bool:
        """Make the arena longer, by ``nbytes`` or what there is. Whether it is longer now.

        cached: also at the cost of what nobody uses now but somebody may find again.
        """


class Arena:
    """A flat buffer of one dtype on one device, handed out in blocks.

    The arena is the first ``capacity`` elements of ``buffer``; ``resize`` moves its end. ``limit``: the most that its
    capacity can become, so that what is larger can be refused at once. ``used``: elements that blocks hold.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """A buffer of its own, of ``num_elements``."""
        self._lie_in(torch.empty(_whole(num_elements), dtype=dtype, device=device), num_elements, num_elements)

    @classmethod
    def within(cls, buffer: Tensor, capacity: int, limit: int) -> Arena:
        """The first ``capacity`` elements of a buffer that others use too."""
        arena = cls.__new__(cls)
        arena._lie_in(buffer, capacity, limit)
        return arena

    def _lie_in(self, buffer: Tensor, capacity: int, limit: int) -> None:
        self.buffer = buffer
        self.capacity = _whole(capacity)
        self.limit = _whole(limit)
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (start, length), by start
        self._held: dict[int, int] = {}
        self.used = 0

    @property
    def used_bytes(self) -> int:
        return self.used * self.buffer.element_size()

    @property
    def capacity_bytes(self) -> int:
        return self.capacity * self.buffer.element_size()

    @property
    def limit_bytes(self) -> int:
        return self.limit * self.buffer.element_size()

    @property
    def free_bytes(self) -> int:
        """Bytes of all free ranges together."""
        return self.capacity_bytes - self.used_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of the free range at the arena's end."""
        start, length = self._free[-1] if self._free else (0, 0)
        return length * self.buffer.element_size() if start + length == self.capacity else 0

    @property
    def num_blocks(self) -> int:
        return len(self._held)

    def block_bytes(self, num_elements: int) -> int:
        """What a block of so many elements takes, alignment included."""
        return aligned(max(num_elements, 1), BLOCK_ALIGN) * self.buffer.element_size()

    def allocate(self, num_elements: int) -> int | None:
        """Offset of a new block, or None where no free range is long enough."""
        need = aligned(max(num_elements, 1), BLOCK_ALIGN)
        fits = [(length, start) for start, length in self._free if length >= need]
        return self._take(min(fits)[1], need) if fits else None

    def allocate_lowest(self, num_elements: int) -> int:
        """Offset of a new block at the lowest address with room: what compaction needs. The room must be there."""
        need = aligned(max(num_elements, 1), BLOCK_ALIGN)
        return self._take(next(start for start, length in self._free if length >= need), need)

    def _take(self, start: int, need: int) -> int:
        length = dict(self._free)[start]
        self._free.remove((start, length))
        if length > need:
            bisect.insort(self._free, (start + need, length - need))
        self._held[start] = need
        self.used += need
        return start

    def free(self, start: int) -> None:
        """Give a block back; neighbouring free ranges merge."""
        length = self._held.pop(start)
        self.used -= length
        at = bisect.bisect(self._free, (start, length))
        if at < len(self._free) and self._free[at][0] == start + length:
            length += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == start:
            start, before = self._free.pop(at - 1)
            length += before
        bisect.insort(self._free, (start, length))

    def resize(self, capacity: int) -> None:
        """Move the arena's end. Raises ValueError where a block, the limit or the buffer is in the way."""
        tail = self._free.pop() if self.tail_bytes else (self.capacity, 0)
        capacity = _whole(capacity)
        if not tail[0] <= capacity <= min(self.limit, self.buffer.numel()):
            self._free += [tail] if tail[1] else []
            raise ValueError(f"capacity: {capacity} elements; allowed is {tail[0]} to {self.limit}")
        self.capacity = capacity
        if capacity > tail[0]:
            self._free.append((tail[0], capacity - tail[0]))

    def check(self) -> None:
        """Prove that free and held ranges tile the buffer, as counted. Raises RuntimeError where they do not."""
        at = 0
        for start, length in sorted([*self._free, *self._held.items()]):
            if start != at:
                raise RuntimeError(f"arena: range at {start} where {at} was expected")
            at = start + length
        if at != self.capacity:
            raise RuntimeError(f"arena: {at} elements accounted for, {self.capacity} in the buffer")
        if self.used != sum(self._held.values()):
            raise RuntimeError(f"arena: blocks hold {sum(self._held.values())} elements, {self.used} counted")
