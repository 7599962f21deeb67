"""A program in arena layout: one flat host tensor, and where in it each operand lies.

The arena has one dtype. Floating tensors are cast to it; those that must keep their own (indices, float32 where
rounding would change the maths) lie in it bit by bit and are read through a view of their dtype. Tensors that adapters
share lie in blocks of their own, found by content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.program import AdapterProgram, Head, SiteOps
from onebase.adapters.tiers.arena import aligned
from onebase.adapters.traits import Traits
from onebase.kernels.ops.instruction import Instruction
from onebase.kernels.tables import Operands

TENSOR_ALIGN = 8  # elements: tensors inside a block start at 16-byte borders of a two-byte type

Place = Callable[[Tensor], int]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of an instruction lies: ``start`` is in elements of the arena's dtype, relative to the block, or
    to the shared block that ``shared`` names."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    shared: str | None = None

    def view(self, buffer: Tensor, block: int) -> Tensor:
        """The tensor as a view of the arena's buffer."""
        count = _elements(self.shape, self.dtype, buffer.dtype)
        start = block + self.start
        return buffer[start : start + count].view(self.dtype)[: _numel(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class PackedInstruction:
    """An instruction whose tensors are slots."""

    instruction: Instruction  # with empty tensors: the plain fields count
    slots: Mapping[str, Slot]

    def bind(self, buffer: Tensor, block: int, shared: Mapping[str, int]) -> Instruction:
        """The instruction over views of the arena. shared: key of a shared block -> its start."""
        return self.instruction.with_tensors(
            {
                name: slot.view(buffer, block if slot.shared is None else shared[slot.shared])
                for name, slot in self.slots.items()
            }
        )


@dataclass(frozen=True, slots=True)
class PackedHead:
    """A classification head whose tensors are slots. They stay float32 whatever the base runs in."""

    weight: Slot
    bias: Slot | None
    per_token: bool

    def bind(self, buffer: Tensor, block: int) -> Head:
        """The head over views of the arena."""
        bias = None if self.bias is None else self.bias.view(buffer, block)
        return Head(self.weight.view(buffer, block), bias, self.per_token)


@dataclass(frozen=True, slots=True, eq=False)
class PackedProgram:
    """All that is left of a program once it is packed: its tensors are in ``data`` and ``shared`` and nowhere else.

    data: the program's own tensors. operands and extra: by site path. shared: key -> packed tensor. sites: how many
    sites it acts on. digest, family, rank: see AdapterProgram.
    """

    digest: str
    family: str
    rank: int
    sites: int
    traits: Traits
    data: Tensor
    operands: Mapping[str, Operands]
    extra: Mapping[str, tuple[PackedInstruction, ...]]
    shared: Mapping[str, Tensor]
    head: PackedHead | None = None

    @property
    def nbytes(self) -> int:
        """Its own bytes, without what it shares."""
        return self.data.numel() * self.data.element_size()

    def check(self) -> None:
        """Prove that operands and slots lie in its own tensors, and nowhere else in the arena. Only its site knows an
        operand's width: here each of its ranks has to have an element. Raises ValueError where they do not."""
        size = self.data.numel()
        for path, op in self.operands.items():
            starts = ((op.a, op.rank), (op.b, op.rank), (op.add_out, int(op.add_out != -1)))
            if any(count and not 0 <= start <= size - count for start, count in starts):
                raise ValueError(f"{path}: {op} is outside the {size} elements of the program")
        head = [] if self.head is None else [self.head.weight, *([self.head.bias] if self.head.bias else [])]
        packed = (one for items in self.extra.values() for one in items)
        for slot in [*head, *(slot for one in packed for slot in one.slots.values())]:
            flat = self.data if slot.shared is None else self.shared[slot.shared]
            if not 0 <= slot.start <= flat.numel() - _elements(slot.shape, slot.dtype, flat.dtype):
                raise ValueError(f"{slot} is outside the {flat.numel()} elements where it lies")


def shifted(op: Operands, block: int) -> Operands:
    """Operands relative to a block's start -> offsets into the arena's buffer."""
    vectors = {name: getattr(op, name) for name in ("add_out", "gain", "sine", "gain_in")}
    there = {name: start + block for name, start in vectors.items() if start >= 0}
    return replace(op, a=op.a + block, b=op.b + block, **there)


def pack(program: AdapterProgram, dtype: torch.dtype, *, pinned: bool = False) -> PackedProgram:
    """Lay a program out as it will lie in the arena, cast to its dtype. AdapterRejected where a value overflows."""
    packer = _Packer(dtype)
    operands: dict[str, Operands] = {}
    extra: dict[str, tuple[PackedInstruction, ...]] = {}
    for path, ops in program.ops.items():
        packer.path = path
        if ops.is_fast:
            operands[path] = _place(ops, packer.place)
        if ops.extra:
            extra[path] = tuple(packer.pack(instruction) for instruction in ops.extra)
    packer.path = "the classification head"
    head = None if program.head is None else packer.pack_head(program.head)
    shared = {key: flat.pin_memory() for key, flat in packer.shared.items()} if pinned else packer.shared
    packed = PackedProgram(
        digest=program.digest,
        family=program.family,
        rank=program.rank,
        sites=len(program.ops),
        traits=Traits.of(program),
        data=packer.finish(pinned=pinned),
        operands=operands,
        extra=extra,
        shared=shared,
        head=head,
    )
    packed.check()
    return packed


class _Packer:
    """Collects tensors in arena layout."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.path = ""
        self.shared: dict[str, Tensor] = {}
        self._dtype = dtype
        self._placed: list[tuple[int, Tensor]] = []
        self._keys: dict[tuple[int, bool], tuple[Tensor, str]] = {}  # of shared tensors: id, keeps -> it, and its key
        self._size = 0

    def place(self, tensor: Tensor) -> int:
        """Start of a tensor that takes the arena's dtype."""
        return self._append(self._cast(tensor))

    def pack(self, instruction: Instruction) -> PackedInstruction:
        slots = {name: self._slot(instruction, name, tensor) for name, tensor in instruction.tensors()}
        empty = {name: torch.empty(0) for name in slots}
        return PackedInstruction(instruction.with_tensors(empty), slots)

    def pack_head(self, head: Head) -> PackedHead:
        bias = None if head.bias is None else self._kept(head.bias)
        return PackedHead(self._kept(head.weight), bias, head.per_token)

    def finish(self, *, pinned: bool) -> Tensor:
        data = torch.zeros(self._size, dtype=self._dtype, pin_memory=pinned)
        for start, flat in self._placed:
            data[start : start + flat.numel()].copy_(flat)
        return data

    def _slot(self, instruction: Instruction, name: str, tensor: Tensor) -> Slot:
        keeps = name in instruction.kept or not tensor.is_floating_point()
        dtype, shape = tensor.dtype if keeps else self._dtype, tuple(tensor.shape)
        if name in instruction.shared:
            return Slot(0, shape, dtype, self._share(tensor, keeps=keeps))
        return Slot(self._append(self._flat(tensor, keeps=keeps)), shape, dtype)

    def _kept(self, tensor: Tensor) -> Slot:
        return Slot(self._append(self._flat(tensor, keeps=True)), tuple(tensor.shape), tensor.dtype)

    def _share(self, tensor: Tensor, *, keeps: bool) -> str:
        """The key of a shared tensor. Sites usually share the very same object, which is cast and hashed once."""
        known = self._keys.get((id(tensor), keeps))
        if known is not None:
            return known[1]
        flat = self._flat(tensor, keeps=keeps)
        key = _content_key(flat)
        self.shared.setdefault(key, flat)
        self._keys[id(tensor), keeps] = tensor, key
        return key

    def _flat(self, tensor: Tensor, *, keeps: bool) -> Tensor:
        return _bits(self._finite(tensor), self._dtype) if keeps else self._cast(tensor)

    def _append(self, flat: Tensor) -> int:
        start = self._size
        self._placed.append((start, flat))
        self._size = aligned(start + flat.numel(), TENSOR_ALIGN)
        return start

    def _cast(self, tensor: Tensor) -> Tensor:
        return self._finite(tensor.detach().reshape(-1).to("cpu", self._dtype))

    def _finite(self, tensor: Tensor) -> Tensor:
        """Finite files may overflow in the arena's dtype (float16 ends at 65,504)."""
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            message = f"{self.path}: its values overflow in {tensor.dtype}, the type the base runs in"
            raise AdapterRejected(message, param=self.path)
        return tensor


def _place(ops: SiteOps, place: Place) -> Operands:
    op = ops.token_low_rank or ops.low_rank
    add_out = place(ops.add_out) if ops.add_out is not None else -1
    if op is None:
        return Operands(rank=0, scale=1.0, a=0, b=0, add_out=add_out)
    token = ops.token_low_rank is not None
    return Operands(op.rank, op.scale, place(op.a), place(op.b), add_out=add_out, token=token)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _elements(shape: tuple[int, ...], dtype: torch.dtype, arena: torch.dtype) -> int:
    """Elements of the arena's dtype that hold a tensor, rounded so that every view of them is whole."""
    nbytes = aligned(_numel(shape) * dtype.itemsize, max(dtype.itemsize, arena.itemsize))
    return nbytes // arena.itemsize


def _bits(tensor: Tensor, arena: torch.dtype) -> Tensor:
    """The tensor's bytes as elements of the arena's dtype."""
    raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    padded = torch.zeros(_elements(tuple(tensor.shape), tensor.dtype, arena) * arena.itemsize, dtype=torch.uint8)
    padded[: raw.numel()] = raw
    return padded.view(arena)


def _content_key(flat: Tensor) -> str:
    raw = flat.contiguous().view(torch.uint8)
    return hashlib.sha256(f"{flat.dtype}{flat.numel()}".encode() + raw.numpy().tobytes()).hexdigest()
