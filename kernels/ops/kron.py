"""Kronecker products, never unfolded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, wide


@dataclass(frozen=True, slots=True, eq=False)
class Kron(RowInstruction):
    """y += (left kron right) x. Yeh et al., LoKr (2309.14859); Edalati et al., KronA (2212.10650).

    left: [p, m]; right: [q, n], or [q, rank] of the product ``right inner`` with inner: [rank, n];
    in_features = m n, out_features = p q. Any scale is already in ``left``.
    """

    phase: ClassVar[Phase] = Phase.ADD
    left: Tensor
    right: Tensor
    inner: Tensor | None = None

    @property
    def flops(self) -> int:
        """The right factor meets every one of m columns, the left one every one of q."""
        (p, m), q = self.left.shape, self.right.shape[0]
        inner = 0 if self.inner is None else self.inner.numel()
        return 2 * (m * (self.right.numel() + inner) + p * m * q)

    def delta(self, rows: Tensor) -> Tensor:
        return self.batched([self], [len(rows)], rows)

    def reference(self, rows: Tensor) -> Tensor:
        right = self.right.double() if self.inner is None else self.right.double() @ self.inner.double()
        return rows.double() @ torch.kron(self.left.double(), right).T

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One product for all segments of equal shapes: in decode, where each is one row, for the whole batch."""
        if len({(_shapes(op), length) for op, length in zip(ops, lengths, strict=True)}) > 1:
            parts = torch.split(rows, list(lengths))
            return torch.cat([cls.batched([op], [len(part)], part) for op, part in zip(ops, parts, strict=True)])
        return _same_shapes(ops, rows.view(len(ops), lengths[0], -1)).reshape(len(rows), -1)


def _shapes(op: Kron) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for _, tensor in op.tensors())


def _same_shapes(ops: Sequence[Kron], rows: Tensor) -> Tensor:
    """rows: [segments, length, m * n] -> [segments, length, p, q]."""
    left, right = _stack([op.left for op in ops]), _stack([op.right for op in ops])
    segments, length, _ = rows.shape
    x = rows.reshape(segments, length * left.shape[2], -1)  # [segments, length * m, n]
    inner = [op.inner for op in ops if op.inner is not None]
    if inner:
        x = x @ _stack(inner).mT
    x = (x @ right.mT).view(segments, length, left.shape[2], -1)  # [.., m, q]
    return wide(left[:, None] @ x)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
