"""Adapted modules: each site of the base is wrapped once, by an instance attribute over its forward.

A site with no adapter in the batch costs one branch. Sites that read the same tensor (q/k/v, gate/up) form a group
whose shrinks share one launch: the first member computes it, the last one drops it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from onebase.adapters.base import Site, SiteKind
from onebase.kernels.base import LowRankKernels, Shrunk
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import ProgramTables


@dataclass(slots=True, eq=False)
class StepPlans:
    """The plans of the present step. None where the whole batch is base: sites then return at once.

    rows: over the packed tokens; logits: over the rows that reach the output head.
    """

    rows: BatchPlan | None = None
    logits: BatchPlan | None = None


@dataclass(slots=True, eq=False)
class SiteGroup:
    """Sites that read one tensor, in the order in which the model calls them."""

    members: tuple[int, ...]
    source: Tensor | None = None
    shrunk: Shrunk | None = None

    def shrink(self, x: Tensor, site: int, kernels: LowRankKernels, plan: BatchPlan) -> Shrunk:
        """The group's shrink of x [.., in]; computed by whichever member asks first."""
        if self.source is not x or self.shrunk is None:
            self.source = x
            self.shrunk = kernels.shrink(x.reshape(-1, x.shape[-1]), self.members, plan)
        return self.shrunk

    def release(self) -> None:
        self.source = self.shrunk = None


@dataclass(frozen=True, slots=True)
class ProbedSite:
    """What the probe forward saw of a module. group: positions (in call order) of sites with the same input."""

    site: Site
    module: nn.Module
    group: tuple[int, ...]
    is_head: bool


def wrap_sites(probed: Sequence[ProbedSite], kernels: LowRankKernels, tables: ProgramTables, plans: StepPlans) -> None:
    """Put every site's forward behind its adapters. Index in ``probed`` = site index in the tables."""
    groups: dict[tuple[int, ...], SiteGroup] = {}
    for index, entry in enumerate(probed):
        base: Callable[[Tensor], Tensor] = entry.module.forward
        if entry.site.kind is SiteKind.EMBEDDING:
            forward = partial(_embedding_forward, base, index, kernels, tables, plans)
        else:
            group = groups.setdefault(entry.group, SiteGroup(entry.group))
            forward = partial(_linear_forward, base, index, entry.is_head, group, kernels, tables, plans)
        entry.module.forward = forward


def _linear_forward(
    base: Callable[[Tensor], Tensor],
    index: int,
    is_head: bool,
    group: SiteGroup,
    kernels: LowRankKernels,
    tables: ProgramTables,
    plans: StepPlans,
    x: Tensor,
) -> Tensor:
    y = base(x)
    plan = plans.logits if is_head else plans.rows
    if plan is None:
        return y
    if tables.active(index, plan):
        kernels.expand(y.view(-1, y.shape[-1]), group.shrink(x, index, kernels, plan), index, plan)
    if index == group.members[-1]:
        group.release()
    return y


def _embedding_forward(
    base: Callable[[Tensor], Tensor],
    index: int,
    kernels: LowRankKernels,
    tables: ProgramTables,
    plans: StepPlans,
    tokens: Tensor,
) -> Tensor:
    y = base(tokens)
    plan = plans.rows
    if plan is not None and tables.active(index, plan):
        kernels.token_low_rank(y.view(-1, y.shape[-1]), tokens.reshape(-1), index, plan)
    return y
