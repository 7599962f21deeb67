"""Segments of one row whose programs have equal shapes, run as one: what decode needs of any instruction. And long
segments in pieces: what prefill needs of those that keep intermediates in float32."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import RowInstruction

Op = TypeVar("Op", bound=RowInstruction)
PIECE = 1 << 23  # elements of a piece's widest intermediate: 32 MiB in float32


def stacked(
    ops: Sequence[Op],
    lengths: Sequence[int],
    rows: Tensor,
    shape: Callable[[Op], Hashable],
    body: Callable[[Sequence[Op], Tensor], Tensor],
) -> Tensor:
    """The deltas of all segments, in order; see RowInstruction.batched.

    body(ops, rows): one row for each op, all of one ``shape`` -> their deltas. Longer segments run by ``delta``.
    """
    groups: dict[Hashable, list[int]] = {}
    for at, (op, length) in enumerate(zip(ops, lengths, strict=True)):
        groups.setdefault((shape(op),) if length == 1 else at, []).append(at)
    if len(groups) == 1:
        return ops[0].delta(rows) if len(ops) == 1 else body(ops, rows)
    parts = torch.split(rows, list(lengths))
    deltas: list[Tensor] = [rows] * len(ops)
    for members in groups.values():
        if len(members) == 1:
            deltas[members[0]] = ops[members[0]].delta(parts[members[0]])
            continue
        together = body([ops[at] for at in members], torch.cat([parts[at] for at in members]))
        for at, delta in zip(members, torch.split(together, 1), strict=True):
            deltas[at] = delta
    return torch.cat(deltas)


def fits(rows: Tensor, width: int) -> bool:
    """Whether an intermediate of this width over all rows stays within a piece."""
    return len(rows) * width <= PIECE


def piecewise(rows: Tensor, width: int, body: Callable[[Tensor], Tensor]) -> Tensor:
    """``body`` of all rows, some at a time, so that an intermediate [n, width] stays within a piece."""
    if fits(rows, width):
        return body(rows)
    return torch.cat([body(part) for part in torch.split(rows, max(1, PIECE // width))])
