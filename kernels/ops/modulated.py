"""Embedding rows multiplied, element by element, by rows of low rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onebase.kernels.ops.instruction import wide
from onebase.kernels.ops.tokens import TokenInstruction


@dataclass(frozen=True, slots=True, eq=False)
class ModulatedRows(TokenInstruction):
    """y *= 1 + scale * a[token] @ b. HiRA at an embedding (ICLR 2025, openreview TwJrTz9cRS).

    a: [vocabulary, rank]; b: [rank, width]. Virtual tokens keep their rows.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    @property
    def flops(self) -> int:
        return 2 * self.b.numel() + 2 * self.b.shape[1]

    def apply(self, tokens: Tensor, rows: Tensor) -> Tensor:
        factor = wide(self.a[tokens.clamp(min=0)]) @ wide(self.b) * (tokens >= 0)[:, None]
        return (wide(rows) * (1 + self.scale * factor)).to(rows.dtype)

    def reference(self, tokens: Tensor, rows: Tensor) -> Tensor:
        out = rows.double().clone()
        for at, token in enumerate(tokens.tolist()):
            if token >= 0:
                out[at] *= 1 + self.scale * (self.a[token].double() @ self.b.double())
        return out.to(rows.dtype)
