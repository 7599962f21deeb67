"""Where adapters lie in the arena: blocks of their own, blocks that they share, compaction between them.

Knows nothing of loads, references or eviction: the caller frees what may go, and moves nothing while a copy fills it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onebase.adapters.arena import Arena
from onebase.adapters.entry import Entry, State
from onebase.adapters.installer import Installer
from onebase.adapters.packing import PackedProgram
from onebase.adapters.shared_blocks import SharedBlock, SharedBlocks


@dataclass(frozen=True, slots=True)
class Placed:
    """start: of the program's own block. new: shared blocks that its copy has to fill, key -> start."""

    start: int
    new: dict[str, int]


class Placement:
    """The book of one arena. Used by the engine's thread."""

    def __init__(self, arena: Arena, shared: SharedBlocks, installer: Installer) -> None:
        self.arena = arena
        self.shared = shared
        self._installer = installer

    def allocate(self, packed: PackedProgram) -> Placed | None:
        """Take a block for the program, and what it shares; None, and nothing taken, where no free range is enough."""
        start = self.arena.allocate(packed.data.numel())
        if start is None:
            return None
        new = self.shared.acquire(packed.shared)
        if new is None:
            self.arena.free(start)
            return None
        return Placed(start, new)

    def needed(self, packed: PackedProgram) -> int:
        """Bytes that the program would take: without the shared blocks that are there already."""
        parts = [packed.data, *(packed.shared[key] for key in self.shared.missing(packed.shared))]
        return sum(self.arena.block_bytes(part.numel()) for part in parts)

    def has_room(self, packed: PackedProgram) -> bool:
        """Whether the free ranges together are enough."""
        return self.arena.capacity_bytes - self.arena.used_bytes >= self.needed(packed)

    def free(self, entry: Entry) -> None:
        """Give back what an entry holds, if it holds anything."""
        if entry.block >= 0:
            self.arena.free(entry.block)
            self.shared.release(entry.shared)
            entry.block = -1

    def compact(self, entries: Collection[Entry]) -> bool:
        """Move every block to the front, so that the free room is one range. False while a copy is in flight.

        Runs between two steps, on the stream of the kernels: they see a block either before or after its move.
        """
        placed = sorted((e for e in entries if e.block >= 0), key=lambda e: e.block)
        if any(entry.state is not State.READY for entry in placed):
            return False
        blocks: list[Entry | SharedBlock] = [*placed, *self.shared]
        blocks.sort(key=_start)
        for block in blocks:
            self.arena.free(_start(block))
        if sum(self._move(block) for block in blocks):
            for entry in placed:
                self._installer.uninstall(entry)
                self._installer.install(entry)
        return True

    def _move(self, block: Entry | SharedBlock) -> bool:
        """Move one block to the lowest place with room; False where it is there already."""
        old, size = _start(block), block.num_elements
        new = self.arena.allocate_lowest(size)
        if new == old:
            return False
        self.arena.buffer[new : new + size].copy_(self.arena.buffer[old : old + size].clone())
        if isinstance(block, SharedBlock):
            block.start = new
        else:
            block.block = new
        return True


def _start(block: Entry | SharedBlock) -> int:
    return block.start if isinstance(block, SharedBlock) else block.block
