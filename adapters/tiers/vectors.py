"""Which instructions of a linear site the low-rank kernels do themselves: scales, and rotations of pairs.

A packed program says where their vectors lie, so tables can take them as operands. Their compiled form stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

from onebase.adapters.packing import PackedInstruction
from onebase.kernels.ops.rotate import PairRotateOut
from onebase.kernels.ops.vector import ScaleIn, ScaleOut
from onebase.kernels.tables import PAIR_BLOCK, Operands

_NONE = Operands(rank=0, scale=1.0, a=0, b=0)


def with_vectors(
    op: Operands | None, items: tuple[PackedInstruction, ...]
) -> tuple[Operands | None, tuple[PackedInstruction, ...]]:
    """The operands with the vectors that they can hold, and the instructions that are left. Starts stay relative to
    the program's block."""
    left = []
    for item in items:
        taken = _taken(op or _NONE, item)
        if taken is None:
            left.append(item)
        else:
            op = taken
    return op, tuple(left)


def _taken(op: Operands, item: PackedInstruction) -> Operands | None:
    """None where it is no vector, or the place is taken."""
    start = {name: slot.start for name, slot in item.slots.items()}
    match item.instruction:
        case ScaleIn() if op.gain_in < 0:
            return replace(op, gain_in=start["gain"])
        case ScaleOut() if op.gain < 0:
            return replace(op, gain=start["gain"])
        case PairRotateOut(group=group) if op.gain < 0 and PAIR_BLOCK % group == 0:
            return replace(op, gain=start["cosine"], sine=start["sine"], group=group)
    return None
