"""Low rank at routed experts: beside the products with stacked 3-D parameters, and in the router's matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onebase.kernels.ops.instruction import Instruction, wide


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLowRank(Instruction):
    """Every expert's matrix W_e of one parameter becomes W_e + factor * B_e A_e; nothing is ever merged.

    parameter: the name of the stacked parameter, of an ``Experts``. a: [experts, rank, in_features]; b: [experts, rank,
    out_features]; per_token: experts that one row goes through. A row's products with its own experts get the term, so
    that whatever the module does between and after them (gates, activations, routing weights) sees the adapted values.
    """

    parameter: str
    a: Tensor
    b: Tensor
    factor: float
    per_token: int

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def flops(self) -> int:
        return 2 * self.per_token * self.rank * (self.a.shape[2] + self.b.shape[2])

    def delta(self, rows: Tensor, expert: int) -> Tensor:
        """rows: [n, in_features], all of them the expert's -> [n, out_features] in float32."""
        return wide(rows @ self.a[expert].T @ self.b[expert]) * self.factor

    def reference(self, rows: Tensor, expert: int) -> Tensor:
        """The definition, in float64."""
        matrix = self.b[expert].double().T @ self.a[expert].double()
        return self.factor * rows.double() @ matrix.T


@dataclass(frozen=True, slots=True, eq=False)
class RouterLowRank(Instruction):
    """The router's matrix W becomes W + factor * B A for the rows: its own forward runs again, over that matrix.

    a: [rank, in_features]; b: [rank, experts].
    """

    a: Tensor
    b: Tensor
    factor: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def flops(self) -> int:
        return 2 * (self.rank + 1) * self.a.shape[1] * self.b.shape[1]

    def matrix(self) -> Tensor:
        """What is added to the weight: [experts, in_features] in float32."""
        return wide(self.b.T @ self.a) * self.factor
