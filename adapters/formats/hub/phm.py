"""Compacter's layers, expanded to dense ones at load. Karimi Mahabadi et al. (2106.04647).

y = x H + b with H = sum_i kron(R_i, W_i): R are n matrices [n, n], shared by all layers or not, possibly of rank one;
W are n matrices [in / n, out / n], possibly products of two thin ones, shared or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.hub.keys import Group, HubFile

MAX_PHM_DIM = 64
_FIELDS = (
    "factorized_phm_W",
    "factorized_phm_rule",
    "phm_bias",
    "phm_dim",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
)


@dataclass(frozen=True, slots=True)
class PhmSettings:
    """n: the number of terms. thin_*: products of two factors; shared_*: one for all layers."""

    n: int
    rank: int
    bias: bool
    thin_weight: bool
    thin_rule: bool
    shared_weight: bool
    shared_rule: bool


def read_phm(fields: Fields) -> PhmSettings | None:
    """None where the adapter is an ordinary one; then the fields say nothing."""
    if not fields.flag("phm_layer"):
        fields.ignore(_FIELDS)
        return None
    return PhmSettings(
        n=fields.integer("phm_dim", 1, MAX_PHM_DIM),
        rank=fields.integer("phm_rank", 1, MAX_RANK),
        bias=fields.flag("phm_bias", default=True),
        thin_weight=fields.flag("factorized_phm_W", default=True),
        thin_rule=fields.flag("factorized_phm_rule"),
        shared_weight=fields.flag("shared_W_phm"),
        shared_rule=fields.flag("shared_phm_rule", default=True),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PhmLayer:
    """One projection: ``prefix`` is its place in the group, ``position`` is ``down`` or ``up``."""

    file: HubFile
    group: Group
    settings: PhmSettings
    prefix: str
    position: str
    where: str

    def dense(self, in_features: int, out_features: int) -> tuple[Tensor, Tensor | None]:
        """weight: [out, in] and bias: [out] or None. Raises AdapterRejected naming the tensor."""
        n = self.settings.n
        if in_features % n or out_features % n:
            raise AdapterRejected(f"phm_dim {n} divides neither side of {self.where} evenly.", param="phm_dim")
        self.file.reducer.spend(self.where, in_features * out_features)
        rule = self._rule()
        weight = self._weight(in_features // n, out_features // n)
        dense = sum(torch.kron(rule[i], weight[i]) for i in range(n))
        assert isinstance(dense, Tensor)
        bias = self._own("b", (out_features,)) if self.settings.bias else None
        return dense.T.contiguous(), bias

    def _rule(self) -> Tensor:
        """[n, n, n]"""
        n = self.settings.n
        take = self._shared if self.settings.shared_rule else self._own
        if self.settings.thin_rule:
            return take("phm_rule_left", (n, n, 1)) @ take("phm_rule_right", (n, 1, n))
        return take("phm_rule", (n, n, n))

    def _weight(self, rows: int, columns: int) -> Tensor:
        """[n, in / n, out / n]"""
        n, rank = self.settings.n, self.settings.rank
        take = self._shared if self.settings.shared_weight else self._own
        name = f"W_{self.position}" if self.settings.shared_weight else "W"
        if self.settings.thin_weight:
            return take(f"{name}_left", (n, rows, rank)) @ take(f"{name}_right", (n, rank, columns))
        return take(name, (n, rows, columns))

    def _own(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.file.take(self.group, f"{self.prefix}.{name}", shape, self.where)

    def _shared(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.file.take_shared(name, shape, self.where)
