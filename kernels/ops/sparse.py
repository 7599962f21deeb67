"""Sparse matrices: few entries anywhere (SHiRA, Super-Tuning, masks on changes), and the product that others build on.

Rows are compressed (CSR) with int32 indices, so that one entry takes its value and four bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, wide
from onebase.kernels.ops.stacking import stacked

with warnings.catch_warnings():  # torch says once a process that CSR is in beta; its product is what is used here
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), check_invariants=False)


@dataclass(frozen=True, slots=True, eq=False)
class SparseMatrix(RowInstruction):
    """A sparse matrix of ``height`` rows.

    starts: [height + 1] int32, where each row's entries begin; columns: [entries] int32; values: [entries]. Entries at
    one place add up.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    @property
    def height(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def flops(self) -> int:
        return 2 * self.values.numel()

    def product(self, columns: Tensor) -> Tensor:
        """The matrix times columns [width, n], float32 or wider -> [height, n]."""
        values = self.values.to(columns.dtype)
        size = (self.height, columns.shape[0])
        matrix = torch.sparse_csr_tensor(self.starts, self.columns, values, size, check_invariants=False)
        return matrix @ columns

    def dense(self, width: int) -> Tensor:
        """[height, width] in float64, entry by entry: for references."""
        matrix = torch.zeros(self.height, width, dtype=torch.float64, device=self.values.device)
        starts = self.starts.tolist()
        for row in range(self.height):
            for at in range(starts[row], starts[row + 1]):
                matrix[row, int(self.columns[at])] += self.values[at].double()
        return matrix


@dataclass(frozen=True, slots=True, eq=False)
class Sparse(SparseMatrix):
    """y += S x. Bhardwaj et al., "SHiRA" (2406.13175)."""

    phase: ClassVar[Phase] = Phase.ADD

    def delta(self, rows: Tensor) -> Tensor:
        return self.product(wide(rows).T).T

    def reference(self, rows: Tensor) -> Tensor:
        return rows.double() @ self.dense(rows.shape[1]).T

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One gather and one sum for all single rows whose matrices have as many entries.

        On the CPU a product each is faster than stacking the entries; elsewhere its launches would cost more.
        """
        shape = id if rows.is_cpu else lambda op: (op.height, len(op.values))
        return stacked(ops, lengths, rows, shape, one_row_each)


def one_row_each(ops: Sequence[Sparse], rows: Tensor) -> Tensor:
    """rows: [len(ops), width] -> [len(ops), height]."""
    columns = torch.stack([op.columns for op in ops]).long()
    parts = wide(rows).gather(1, columns) * torch.stack([op.values for op in ops])
    counts = torch.stack([op.starts for op in ops]).diff(dim=1).flatten()
    cells = torch.arange(len(counts), device=rows.device)
    target = torch.repeat_interleave(cells, counts, output_size=parts.numel())
    out = parts.new_zeros(len(counts)).index_add_(0, target, parts.flatten())
    return out.view(len(ops), -1)


def compress(rows: Tensor, columns: Tensor, values: Tensor, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, columns, values) of entries in any order. rows, columns: [entries] integers within their bounds."""
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(height + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows.long(), minlength=height).cumsum(0)
    return starts, columns[order].int(), values[order].contiguous()
