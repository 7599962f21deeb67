"""The smallest exact operation for a matrix that is known by its factors, and a bound on what small files unfold to."""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import Site
from onebase.adapters.errors import AdapterTooLarge
from onebase.adapters.formats.fields import MAX_RANK
from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.dense import Dense

MAX_EXPANDED = 1 << 31  # elements of one adapter on the host, in float32


class Reducer:
    """Makes the operations of one adapter. Raises AdapterTooLarge where they hold over MAX_EXPANDED elements."""

    def __init__(self) -> None:
        self._elements = 0

    def spend(self, path: str, elements: int) -> None:
        """Count elements before they are made."""
        self._elements += elements
        if self._elements > MAX_EXPANDED:
            raise AdapterTooLarge(
                f"{path}: the adapter unfolds to over {MAX_EXPANDED} elements, which is the limit.",
                param=path,
            )

    def dense(self, site: Site, weight: Tensor) -> SiteOps:
        """weight: [out_features, in_features]. Count it with spend before it is made."""
        return SiteOps(extra=(Dense(weight.contiguous()),))

    def product(self, site: Site, a: Tensor, b: Tensor, scale: float = 1.0) -> SiteOps:
        """``y += scale * (x @ a.T) @ b`` with a [rank, in_features] and b [rank, out_features].

        Low rank, or dense where that is smaller.
        """
        low_rank, dense = len(a) * (site.in_features + site.out_features), site.in_features * site.out_features
        self.spend(site.path, min(low_rank, dense))
        if low_rank < dense and len(a) <= MAX_RANK:
            return SiteOps(low_rank=LowRank(a.contiguous(), b.contiguous(), scale))
        return self.dense(site, (b.T @ a) * scale)
