"""Where the coefficients of FourierFT and WaveFT stand: places drawn with a seed, which the file leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onebase.adapters.base import Site
from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.formats.targets import SiteTensors

MAX_PLACES = 1 << 28  # drawn as a permutation: eight bytes each while it is
SEEDS = (-(1 << 63), (1 << 63) - 1)


class Locations:
    """PEFT's places for one seed: the head of a random permutation of the matrix's entries, on the CPU's generator.

    Matrices of one size are drawn once, with as many places as the longest list of coefficients (the tensors ``suffix``
    of the groups) needs.
    """

    def __init__(self, seed: int, groups: Sequence[SiteTensors], suffix: str) -> None:
        self._seed = seed
        self._longest: dict[int, int] = {}
        self._drawn: dict[int, Tensor] = {}
        for group in groups:
            total, count = group.site.in_features * group.site.out_features, math.prod(group.shape(suffix))
            self._longest[total] = max(self._longest.get(total, 0), min(count, total))

    def draw(self, site: Site, count: int) -> tuple[Tensor, Tensor]:
        """(rows, columns), [count] int64. Raises AdapterTooLarge where the matrix has too many entries."""
        total = site.in_features * site.out_features
        if total > MAX_PLACES:
            message = f"{site.path} has {total} weights; over {MAX_PLACES} no places are drawn from them."
            raise AdapterTooLarge(message, param=site.path)
        if total not in self._drawn:
            generator = torch.Generator().manual_seed(self._seed)
            self._drawn[total] = torch.randperm(total, generator=generator)[: self._longest[total]].clone()
        places = self._drawn[total][:count]
        return places // site.in_features, places % site.in_features


def take_coefficients(group: SiteTensors, suffix: str) -> Tensor:
    """The coefficients of a site, float32 [count]. Raises AdapterRejected for more than it has weights, or none."""
    shape, most = group.shape(suffix), group.site.in_features * group.site.out_features
    if len(shape) != 1 or not 1 <= shape[0] <= most:
        key = group.key(suffix)
        raise AdapterRejected(f"The tensor {key!r} has shape {shape}; it must be a list of 1 to {most}.", param=key)
    return group.take(suffix, shape, "one for each place")
