"""Where adapters lie in the arena: blocks of their own, blocks that they share, compaction between them.

Knows nothing of loads, references or eviction. All runs between two steps, on the stream of the kernels: they see a
block either before or after its move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers.arena import Arena
from onebase.adapters.tiers.entry import Entry, State
from onebase.adapters.tiers.installer import Installer
from onebase.adapters.tiers.shared_blocks import SharedBlock, SharedBlocks

# Moved in each step: some milliseconds of a host's memory, one of a GPU's. A block that is larger moves alone.
_MOVED_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
_PIECE_BYTES = 16 << 20  # of a block, copied at once
_MOVED_BLOCKS = 16  # each of their users is installed anew


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
        self.most_moved = _MOVED_BYTES.get(arena.buffer.device.type, _MOVED_BYTES["cuda"])
        self._installer = installer
        self.begin_step()

    def begin_step(self) -> None:
        """Compaction may move as much again: the engine's next step begins."""
        self._left_bytes, self._left_blocks = self.most_moved, _MOVED_BLOCKS

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

    def freed_by(self, entries: Collection[Entry]) -> int:
        """Bytes that come free when all these entries go: with the blocks that nobody else shares."""
        own = sum(self.arena.block_bytes(entry.num_elements) for entry in entries)
        users = Counter(key for entry in entries for key in entry.shared)
        return own + sum(
            self.arena.block_bytes(block.num_elements)
            for key, block in self.shared.items()
            if users[key] == block.references
        )

    def free(self, entry: Entry) -> None:
        """Give back what an entry holds, if it holds anything."""
        if entry.block >= 0:
            self.arena.free(entry.block)
            self.shared.release(entry.shared)
            entry.block = -1

    def compact(self, entries: Iterable[Entry]) -> bool:
        """Move blocks to lower places, the lowest first, as far as the step's allowance goes; whether any moved.

        Called step after step it makes the free room one range at the arena's end. What a copy is filling stays where
        it is until that is done.
        """
        placed = [entry for entry in entries if entry.block >= 0]
        busy = {key for entry in placed if entry.state is not State.READY for key in entry.shared}
        blocks: list[Entry | SharedBlock] = [entry for entry in placed if entry.state is State.READY]
        blocks += [block for key, block in self.shared.items() if key not in busy]
        moved = self._move_some(sorted(blocks, key=_start))
        keys = {key for key, block in self.shared.items() if block in moved}
        for entry in placed:
            if entry.state is State.READY and (entry in moved or not keys.isdisjoint(entry.shared)):
                self._installer.uninstall(entry)
                self._installer.install(entry)
        return bool(moved)

    def _move_some(self, blocks: Iterable[Entry | SharedBlock]) -> set[Entry | SharedBlock]:
        moved: set[Entry | SharedBlock] = set()
        for block in blocks:
            size = self.arena.block_bytes(block.num_elements)
            if self._left_blocks == 0 or (size > self._left_bytes and self._left_blocks < _MOVED_BLOCKS):
                break
            if self._move(block):
                moved.add(block)
                self._left_blocks -= 1
                self._left_bytes -= size
        return moved

    def _move(self, block: Entry | SharedBlock) -> bool:
        """Move one block to the lowest place with room; False where it is there already."""
        old, size = _start(block), block.num_elements
        self.arena.free(old)
        new = self.arena.allocate_lowest(size)
        if new == old:
            return False
        self._copy_down(old, new, size)
        if isinstance(block, SharedBlock):
            block.start = new
        else:
            block.block = new
        return True

    def _copy_down(self, old: int, new: int, size: int) -> None:
        """In pieces, since places may overlap and copies of them lie beside the budget: what a piece overwrites of the
        old place has moved already."""
        buffer = self.arena.buffer
        step = _PIECE_BYTES // buffer.element_size()
        for at in range(0, size, step):
            stop = min(at + step, size)
            buffer[new + at : new + stop].copy_(buffer[old + at : old + stop].clone())


def _start(block: Entry | SharedBlock) -> int:
    return block.start if isinstance(block, SharedBlock) else block.block
