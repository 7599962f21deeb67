"""Puts adapters that lie in the arena into the tables that kernels read, under handles.

What the tables take is made beside the copy, in its thread: the engine's loop only enters it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.packing import PackedInstruction, shifted
from onebase.adapters.program import Head
from onebase.adapters.tiers.entry import Entry
from onebase.adapters.tiers.shared_blocks import SharedBlocks
from onebase.adapters.tiers.vectors import with_vectors
from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.ops.instruction import Instruction
from onebase.kernels.ops.reft import Intervention, Part
from onebase.kernels.tables import Operands, ProgramRow, ProgramTables

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
        linears: frozenset[str],
    ) -> None:
        """site_index: of the tables, by path; linears: the paths of linear modules among them."""
        self._buffer = buffer
        self._shared = shared
        self._tables = tables
        self._kernels = kernels
        self._instructions = instructions
        self._site_index = site_index
        self._linears = linears
        self._next_handle = 0

    def prepare(self, entry: Entry, block: int, starts: Mapping[str, int]) -> Installable:
        """What the tables take of an entry whose block and shared blocks lie there. May be called by any thread."""
        packed, left = self._split(entry)
        operands = {self._site_index[path]: shifted(op, block) for path, op in packed.items()}
        extra = {path: tuple(item.bind(self._buffer, block, starts) for item in items) for path, items in left.items()}
        head = None if entry.packed_head is None else entry.packed_head.bind(self._buffer, block)
        windowed = entry.traits.window is not None
        parts = (_acting_at(extra, "first"), _acting_at(extra, "last")) if windowed else (extra,)
        row = self._tables.row_of(operands, range(block, block + entry.num_elements))
        return Installable(block, starts, row, parts, head)

    def _split(self, entry: Entry) -> tuple[dict[str, Operands], dict[str, tuple[PackedInstruction, ...]]]:
        """What the kernels' tables take, the vectors of linear sites included, and the instructions that are left."""
        operands, extra = dict(entry.operands), dict(entry.extra)
        for path in self._linears & extra.keys():
            op, left = with_vectors(operands.get(path), extra.pop(path))
            operands |= {} if op is None else {path: op}
            extra |= {path: left} if left else {}
        return operands, extra

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
