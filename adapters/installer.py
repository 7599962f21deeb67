"""Puts adapters that lie in the arena into the tables that kernels read, under handles."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from onebase.adapters.entry import Entry
from onebase.adapters.packing import shifted
from onebase.adapters.shared_blocks import SharedBlocks
from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.ops.instruction import Instruction
from onebase.kernels.ops.reft import Intervention, Part
from onebase.kernels.tables import Operands, ProgramTables

Extra = Mapping[str, tuple[Instruction, ...]]  # by site


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

    def install(self, entry: Entry) -> None:
        """Give a placed entry its handle, and one more for the tail of the prompt where it acts on both ends."""
        entry.handle, self._next_handle = self._next_handle, self._next_handle + 1
        operands = {self._site_index[path]: shifted(op, entry.block) for path, op in entry.operands.items()}
        shared = self._shared.starts(entry.shared)
        extra = {
            path: tuple(item.bind(self._buffer, entry.block, shared) for item in items)
            for path, items in entry.extra.items()
        }
        head = entry.packed_head
        entry.head = None if head is None else head.bind(self._buffer, entry.block)
        entry.tail = entry.handle
        if entry.traits.window is None:
            return self._install_part(entry.handle, operands, extra)
        entry.tail, self._next_handle = self._next_handle, self._next_handle + 1
        self._install_part(entry.handle, operands, _acting_at(extra, "first"))
        return self._install_part(entry.tail, operands, _acting_at(extra, "last"))

    def _install_part(self, handle: int, operands: Mapping[int, Operands], extra: Extra) -> None:
        self._tables.install(handle, operands)
        self._instructions.install(handle, extra)

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
