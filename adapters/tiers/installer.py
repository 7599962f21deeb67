"""Puts adapters that lie in the arena into the tables that kernels read, under handles.

What the tables take is made beside the copy, in its thread: the engine's loop only enters it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.packing import shifted
from onebase.adapters.program import Head
from onebase.adapters.tiers.entry import Entry
from onebase.adapters.tiers.shared_blocks import SharedBlocks
from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.ops.instruction import Instruction
from onebase.kernels.ops.reft import Intervention, Part
from onebase.kernels.tables import ProgramRow, ProgramTables

Extra = Mapping[str, tuple[Instruction, ...]]  # by site


@dataclass(frozen=True, slots=True, eq=False)
class Installable:
    """An adapter as the tables take it, for one place in the arena.

    parts: the instructions of each handle: one, or one for either end of the prompt that its window speaks of.
    """

    block: int
    starts: Mapping[str, int]  # of the shared blocks
    row: ProgramRow
    parts: tuple[Extra, ...]
    head: Head | None


class Installer:
    """Handles are unique and growing: an adapter that is installed again, after a move, has another one."""

    def __init__(
        self,
        buffer: Tensor,
        shared: SharedBlocks,
        tables: ProgramTables,
        kernels: LowRankKernels,
        instructions: InstructionTable,
        site_index: Mapping[str, int],
    ) -> None:
        self._buffer = buffer
        self._shared = shared
        self._tables = tables
        self._kernels = kernels
        self._instructions = instructions
        self._site_index = site_index
        self._next_handle = 0

    def prepare(self, entry: Entry, block: int, starts: Mapping[str, int]) -> Installable:
        """What the tables take of an entry whose block and shared blocks lie there. May be called by any thread."""
        operands = {self._site_index[path]: shifted(op, block) for path, op in entry.operands.items()}
        extra = {
            path: tuple(item.bind(self._buffer, block, starts) for item in items) for path, items in entry.extra.items()
        }
        head = None if entry.packed_head is None else entry.packed_head.bind(self._buffer, block)
        windowed = entry.traits.window is not None
        parts = (_acting_at(extra, "first"), _acting_at(extra, "last")) if windowed else (extra,)
        row = self._tables.row_of(operands, range(block, block + entry.num_elements))
        return Installable(block, starts, row, parts, head)

    def install(self, entry: Entry) -> None:
        """Give a placed entry its handle, and one more for the tail of the prompt where it acts on both ends."""
        starts, ready = self._shared.starts(entry.shared), entry.installable
        if ready is None or (ready.block, ready.starts) != (entry.block, starts):  # it was moved
            ready = self.prepare(entry, entry.block, starts)
        entry.installable, entry.head = None, ready.head
        handles = [self._install(ready.row, part) for part in ready.parts]
        entry.handle, entry.tail = handles[0], handles[-1]

    def _install(self, row: ProgramRow, extra: Extra) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._tables.install(handle, row)
        self._instructions.install(handle, extra)
        return handle

    def uninstall(self, entry: Entry) -> None:
        """Take its handles out of the tables; its block is the caller's."""
        for handle in {entry.handle, entry.tail}:
            self._kernels.forget(handle)
            self._tables.remove(handle)
            self._instructions.remove(handle)


def _acting_at(extra: Extra, part: Part) -> Extra:
    """Without the interventions of the other part of a window."""
    kept = {
        path: tuple(op for op in ops if not isinstance(op, Intervention) or op.part in (part, "both"))
        for path, ops in extra.items()
    }
    return {path: ops for path, ops in kept.items() if ops}
