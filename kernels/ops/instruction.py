"""What an instruction is: a small frozen object whose tensors lie in the arena, and the delta that it adds.

Every instruction at a linear site is a delta that is added to something, so that programs on one row add up and a
scale of 0 is the base. The phase says what the delta is computed from and what it is added to:

    INPUT   x += scale * delta(x)     before the base reads it; everything else at the site still sees the plain x
    MAP     y += scale * delta(y)     y as the base left it, bias included
    ADD     y += scale * delta(x)     x as the site was called with it

Instructions of other sites (norms, embeddings, attention, blocks) have contracts of their own: see their modules.
Knows nothing of programs, plans or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import ClassVar, Self

import torch
from torch import Tensor


class Phase(StrEnum):
    INPUT = "input"
    MAP = "map"
    ADD = "add"


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """Base of all instructions. Fields are tensors, ``Tensor | None``, or plain numbers, strings and tuples of them.

    A program holds instructions over host tensors; ``with_tensors`` makes the same over views of the arena.
    kept: fields that keep their dtype there (float32 where rounding would change the maths); integer tensors do so
    without being named, other floating ones are cast to the arena's. shared: fields that many adapters have in common
    (VeRA's projections), held once and found by content.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(field, tensor) of those that are present."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                yield item.name, value

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        return replace(self, **tensors)

    @property
    def rank(self) -> int:
        """The rank of a low-rank instruction, 0 for the others."""
        return 0

    @property
    def scalable(self) -> bool:
        """Whether other scales than 0 and 1 mean something, and the instruction adds to others of its kind."""
        return True

    @property
    def flops(self) -> int:
        """Floating point operations for one row; a multiplication with an addition counts two."""
        return 2 * sum(tensor.numel() for _, tensor in self.tensors() if tensor.is_floating_point())


@dataclass(frozen=True, slots=True, eq=False)
class RowInstruction(Instruction, ABC):
    """An instruction at a linear site."""

    phase: ClassVar[Phase]

    @abstractmethod
    def delta(self, rows: Tensor) -> Tensor:
        """The batched body. rows: [n, width of the source] in the arena's dtype -> [n, width of the target].

        Returns float32 (float64 for float64 rows) or the arena's dtype; the caller adds it in float32 and rounds once.
        Runs on any device, without synchronising with it, and never a row at a time.
        """

    @abstractmethod
    def reference(self, rows: Tensor) -> Tensor:
        """The definition, as plainly as possible, in float64: the test holds ``delta`` to it."""

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """Several programs at once: ``rows`` holds lengths[i] rows of ops[i], one run after the other.

        A segment at a time here; the frequent instructions do better.
        """
        if len(ops) == 1:
            return ops[0].delta(rows)
        parts = torch.split(rows, list(lengths))
        return torch.cat([op.delta(part) for op, part in zip(ops, parts, strict=True)])


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def repeated(vectors: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """[sum(lengths), width]: vectors[i] once for each of lengths[i] rows. One copy, and no upload of lengths."""
    return torch.cat([vector.expand(length, -1) for vector, length in zip(vectors, lengths, strict=True)])
