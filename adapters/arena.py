"""One device buffer for adapter tensors: exact-size blocks, no slots.

The allocator keeps a sorted list of free ranges and takes the smallest that fits. Offsets and sizes are in elements.
"""

from __future__ import annotations

import bisect

import torch

# 128 bytes of a two-byte type: what a GPU reads at once. Tensors inside a block start at 16-byte borders.
BLOCK_ALIGN = 64


def aligned(n: int, to: int) -> int:
    return -(-n // to) * to


class Arena:
    """A flat buffer of ``num_elements`` of one dtype on one device, handed out in blocks."""

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = num_elements // BLOCK_ALIGN * BLOCK_ALIGN
        self.buffer = torch.empty(self.capacity, dtype=dtype, device=device)
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (start, length), by start
        self._held: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Elements held by blocks."""
        return sum(self._held.values())

    @property
    def used_bytes(self) -> int:
        return self.used * self.buffer.element_size()

    @property
    def capacity_bytes(self) -> int:
        return self.capacity * self.buffer.element_size()

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
        return start

    def free(self, start: int) -> None:
        """Give a block back; neighbouring free ranges merge."""
        length = self._held.pop(start)
        at = bisect.bisect(self._free, (start, length))
        if at < len(self._free) and self._free[at][0] == start + length:
            length += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == start:
            start, before = self._free.pop(at - 1)
            length += before
        bisect.insort(self._free, (start, length))

    def check(self) -> None:
        """Prove that free and held ranges tile the buffer. Raises RuntimeError where they do not."""
        at = 0
        for start, length in sorted([*self._free, *self._held.items()]):
            if start != at:
                raise RuntimeError(f"arena: range at {start} where {at} was expected")
            at = start + length
        if at != self.capacity:
            raise RuntimeError(f"arena: {at} elements accounted for, {self.capacity} in the buffer")
