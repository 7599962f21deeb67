"""One device buffer for adapter tensors: exact-size blocks, no slots.

The allocator keeps a sorted list of free ranges and takes the smallest that fits. Offsets and sizes are in elements.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.program import AdapterProgram, SiteOps
from onebase.kernels.tables import Operands

# 128 bytes of a two-byte type: what a GPU reads at once. Tensors inside a block start at 16-byte borders.
BLOCK_ALIGN = 64
TENSOR_ALIGN = 8


def _aligned(n: int, to: int) -> int:
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
        return _aligned(max(num_elements, 1), BLOCK_ALIGN) * self.buffer.element_size()

    def allocate(self, num_elements: int) -> int | None:
        """Offset of a new block, or None where no free range is long enough."""
        need = _aligned(max(num_elements, 1), BLOCK_ALIGN)
        fits = [(length, start) for start, length in self._free if length >= need]
        return self._take(min(fits)[1], need) if fits else None

    def allocate_lowest(self, num_elements: int) -> int:
        """Offset of a new block at the lowest address with room: what compaction needs. The room must be there."""
        need = _aligned(max(num_elements, 1), BLOCK_ALIGN)
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


@dataclass(frozen=True, slots=True, eq=False)
class PackedProgram:
    """A program in arena layout: one flat host tensor, and per site where its operands lie in it."""

    program: AdapterProgram
    data: Tensor
    operands: Mapping[str, Operands]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def shifted(op: Operands, block: int) -> Operands:
    """Operands relative to a block's start -> offsets into the arena's buffer."""
    return replace(op, a=op.a + block, b=op.b + block, add_out=op.add_out + block if op.add_out >= 0 else -1)


def pack(program: AdapterProgram, dtype: torch.dtype, *, pinned: bool = False) -> PackedProgram:
    """Lay a program out as it will lie in the arena, cast to its dtype. AdapterRejected where a value overflows."""
    operands: dict[str, Operands] = {}
    placed: list[tuple[int, Tensor]] = []
    size = 0

    def place(tensor: Tensor) -> int:
        nonlocal size
        offset = size
        placed.append((offset, tensor))
        size = _aligned(offset + tensor.numel(), TENSOR_ALIGN)
        return offset

    for path, ops in program.ops.items():
        operands[path] = _place(ops, place)
    data = torch.zeros(size, dtype=dtype, pin_memory=pinned)
    for offset, tensor in placed:
        data[offset : offset + tensor.numel()].copy_(tensor.reshape(-1))
    _check_finite(program, operands, data)
    return PackedProgram(program, data, operands)


def _check_finite(program: AdapterProgram, operands: Mapping[str, Operands], data: Tensor) -> None:
    """Finite files may overflow in the arena's dtype (float16 ends at 65,504)."""
    if bool(torch.isfinite(data).all()):
        return
    starts = {path: min(at for at in (op.a, op.b, op.add_out) if at >= 0) for path, op in operands.items()}
    first = int(torch.nonzero(~torch.isfinite(data))[0])
    path = max((path for path, start in starts.items() if start <= first), key=lambda path: starts[path])
    raise AdapterRejected(f"{path}: its values overflow in {data.dtype}, the type the base runs in", param=path)


def _place(ops: SiteOps, place: Callable[[Tensor], int]) -> Operands:
    op = ops.token_low_rank or ops.low_rank
    add_out = place(ops.add_out) if ops.add_out is not None else -1
    if op is None:
        return Operands(rank=0, scale=1.0, a=0, b=0, add_out=add_out)
    token = ops.token_low_rank is not None
    return Operands(op.rank, op.scale, place(op.a), place(op.b), add_out=add_out, token=token)
