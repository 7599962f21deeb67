"""Full matrices, and full rows of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, wide


@dataclass(frozen=True, slots=True, eq=False)
class Dense(RowInstruction):
    """y += D x. weight: [out_features, in_features]. What no smaller instruction can say (RandLoRA, saved modules)."""

    phase: ClassVar[Phase] = Phase.ADD
    weight: Tensor

    def delta(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows, self.weight)

    def reference(self, rows: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", rows.double(), self.weight.double())


@dataclass(frozen=True, slots=True, eq=False)
class OutputRows(RowInstruction):
    """Some output features get another weight row: y[index[k]] += weight[k] . x.

    index: [n] int32, distinct; weight: [n, in_features], the new rows less the base's. Trained tokens of a tied head.
    """

    phase: ClassVar[Phase] = Phase.ADD
    index: Tensor
    weight: Tensor
    out_features: int

    def delta(self, rows: Tensor) -> Tensor:
        part = wide(torch.nn.functional.linear(rows, self.weight))
        return part.new_zeros(len(rows), self.out_features).index_copy_(1, self.index.long(), part)

    def reference(self, rows: Tensor) -> Tensor:
        matrix = torch.zeros(self.out_features, self.weight.shape[1], dtype=torch.float64, device=rows.device)
        for at, row in zip(self.index.tolist(), self.weight.double(), strict=True):
            matrix[at] = row
        return rows.double() @ matrix.T
