"""Low rank over matrices that many adapters share: each adapter brings only vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, repeated, wide


@dataclass(frozen=True, slots=True, eq=False)
class SharedLowRank(RowInstruction):
    """y += out * (B (mid * (A x))). Kopiczko et al., "VeRA" (2310.11454).

    a: [rank, in_features] and b: [rank, out_features], both rank-major and held once for all adapters that have equal
    ones; mid: [rank]; out: [out_features]. Any scale is already in ``mid``.
    """

    phase: ClassVar[Phase] = Phase.ADD
    shared: ClassVar[tuple[str, ...]] = ("a", "b")
    a: Tensor
    b: Tensor
    mid: Tensor
    out: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self, rows: Tensor) -> Tensor:
        return self.batched([self], [len(rows)], rows)

    def reference(self, rows: Tensor) -> Tensor:
        inner = rows.double() @ self.a.double().T
        return ((inner * self.mid.double()) @ self.b.double()) * self.out.double()

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One pair of products for each pair of matrices, whatever the number of adapters over it."""
        parts = torch.split(rows, list(lengths))
        deltas: list[Tensor] = [rows] * len(ops)
        pairs: dict[tuple[int, int], list[int]] = {}
        for at, op in enumerate(ops):
            pairs.setdefault((op.a.data_ptr(), op.b.data_ptr()), []).append(at)
        for members in pairs.values():
            sizes = [lengths[at] for at in members]
            product = _product([ops[at] for at in members], sizes, torch.cat([parts[at] for at in members]))
            for at, delta in zip(members, torch.split(product, sizes), strict=True):
                deltas[at] = delta
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas)


def _product(ops: Sequence[SharedLowRank], lengths: Sequence[int], rows: Tensor) -> Tensor:
    inner = torch.nn.functional.linear(rows, ops[0].a) * repeated([op.mid for op in ops], lengths)
    return wide(inner @ ops[0].b) * repeated([op.out for op in ops], lengths)
