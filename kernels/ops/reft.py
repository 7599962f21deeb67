"""Interventions of representation fine-tuning: a change of a layer's output inside a small subspace.

Wu et al. (2404.03592): LoReFT h + R^T (W h + b - R h), DiReFT h + R^T (W h + b). Which tokens of a prompt they act on
is not their matter: their program is on the rows of those tokens only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from onebase.kernels.ops.bottleneck import ACTIVATIONS
from onebase.kernels.ops.instruction import Phase, RowInstruction, wide

Part = Literal["first", "last", "both"]


@dataclass(frozen=True, slots=True, eq=False)
class Intervention(RowInstruction):
    """h += R^T (act(W h + b) - R h) at a layer's output h, or without R h.

    source: W [rank, width]; bias: b [rank]; projection: R [rank, width]. activation: a key of ACTIVATIONS. subtracts:
    whether R h is taken off; without an activation it is in W already. part: the tokens of its program's window that it
    acts on.
    """

    phase: ClassVar[Phase] = Phase.MAP

    source: Tensor
    bias: Tensor
    projection: Tensor
    activation: str = "identity"
    subtracts: bool = False
    part: Part = "both"

    @property
    def rank(self) -> int:
        return self.source.shape[0]

    @property
    def scalable(self) -> bool:
        return self.activation == "identity"  # else not linear: see Bottleneck

    def delta(self, rows: Tensor) -> Tensor:
        return _together([self], rows[None])[0]

    def reference(self, rows: Tensor) -> Tensor:
        h, r = rows.double(), self.projection.double()
        inner = ACTIVATIONS[self.activation](h @ self.source.double().T + self.bias.double())
        return (inner - h @ r.T if self.subtracts else inner) @ r

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """Segments of one length under interventions of one shape: two or three products for all of them. Most
        segments are as long as their window."""
        groups: dict[Hashable, list[int]] = {}
        for at, (op, length) in enumerate(zip(ops, lengths, strict=True)):
            groups.setdefault((length, _shape(op)), []).append(at)
        parts = torch.split(rows, list(lengths))
        deltas: list[Tensor] = [rows] * len(ops)
        for members in groups.values():
            together = _together([ops[at] for at in members], torch.stack([parts[at] for at in members]))
            for at, delta in zip(members, together.unbind(), strict=True):
                deltas[at] = delta
        return torch.cat(deltas)


def _shape(op: Intervention) -> Hashable:
    return op.source.shape, op.activation, op.subtracts


def _together(ops: Sequence[Intervention], rows: Tensor) -> Tensor:
    """rows: [len(ops), n, width] -> [len(ops), n, width]"""
    projection = torch.stack([op.projection for op in ops])  # [ops, rank, width]
    source = torch.stack([op.source for op in ops]).mT
    inner = wide(torch.baddbmm(torch.stack([op.bias for op in ops])[:, None], rows, source))
    inner = ACTIVATIONS[ops[0].activation](inner)
    if ops[0].subtracts:
        inner = inner - torch.bmm(rows, projection.mT)
    return torch.bmm(inner.to(rows.dtype), projection)
