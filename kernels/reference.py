"""The low-rank kernels in plain torch: the definition that the other bodies are tested against.

Segment by segment, each product in fp32 (float64 stays float64), one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from onebase.kernels.base import NOTHING, Shrunk, own
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import ProgramTables, Use
from onebase.kernels.vectors import input_gain, output_map


@dataclass(frozen=True, slots=True)
class ReferenceShrunk(Shrunk):
    """xa by site and segment: each [segment.length, rank], fp32 or float64."""

    parts: dict[tuple[int, Segment], Tensor]


class ReferenceKernels:
    """See LowRankKernels."""

    name = "reference"

    def __init__(self, tables: ProgramTables) -> None:
        self._tables = tables

    def shrink(self, x: Tensor, group: tuple[int, ...], plan: BatchPlan) -> ReferenceShrunk:
        uses = [(site, use) for site in group for use in self._tables.uses(site, plan)]
        return ReferenceShrunk({(site, use.segment): self._project(x, site, use) for site, use in uses})

    def expand(self, y: Tensor, shrunk: Shrunk, site: int, plan: BatchPlan) -> None:
        self.expand_group((y,), shrunk, (site,), plan)

    def expand_group(
        self,
        ys: Sequence[Tensor],
        shrunk: Shrunk,
        sites: tuple[int, ...],
        plan: BatchPlan,
        origins: Mapping[int, Tensor] = NOTHING,
    ) -> None:
        parts, mapped = own(shrunk, ReferenceShrunk).parts, self._tables.touched(plan).maps
        for y, site in zip(ys, sites, strict=True):
            origin = origins.get(site, y)
            if site in mapped and origin is y and len(plan.layers) > 1:
                origin = y.clone()
            for use in self._tables.uses(site, plan):
                xa = partial(parts.__getitem__, (site, use.segment))
                self._update(y, site, use, xa, _rows(origin, use.segment))

    def scale_in(self, target: Tensor, x: Tensor, site: int, plan: BatchPlan) -> None:
        for use in self._tables.uses(site, plan):
            gain = input_gain(self._tables, site, use.op)
            if gain is not None:
                rows = _rows(target, use.segment)
                rows.copy_(_wide(rows) + use.segment.scale * gain.delta(_wide(_rows(x, use.segment))))

    def token_low_rank(self, y: Tensor, tokens: Tensor, site: int, plan: BatchPlan) -> None:
        for use in self._tables.uses(site, plan, token=True):
            self._update(y, site, use, partial(self._look_up, tokens, site, use))

    def warm_up(self, groups: Iterable[tuple[int, ...]] = ()) -> None:
        """Nothing is compiled."""

    def forget(self, handle: int) -> None:
        """Nothing is cached."""

    def _project(self, x: Tensor, site: int, use: Use) -> Tensor:
        a, _ = self._tables.factors(site, use.op)
        return _wide(_rows(x, use.segment)) @ _wide(a).T

    def _look_up(self, tokens: Tensor, site: int, use: Use) -> Tensor:
        a, _ = self._tables.factors(site, use.op)
        return _wide(a[_rows(tokens, use.segment)])

    def _update(self, y: Tensor, site: int, use: Use, xa: Callable[[], Tensor], origin: Tensor | None = None) -> None:
        """origin: what a map reads, the segment's rows; None where there is no map."""
        rows = _rows(y, use.segment)
        delta = torch.zeros(rows.shape, dtype=_wide(y[:0]).dtype, device=y.device)
        if use.op.rank:
            _, b = self._tables.factors(site, use.op)
            delta += use.op.scale * (xa() @ _wide(b))
        if use.op.add_out >= 0:
            delta += self._tables.add_out(site, use.op)
        change = output_map(self._tables, site, use.op)
        if change is not None and origin is not None:
            delta += change.delta(_wide(origin))
        rows.copy_(_wide(rows) + use.segment.scale * delta)


def _rows(tensor: Tensor, segment: Segment) -> Tensor:
    return tensor[segment.start : segment.stop]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()
