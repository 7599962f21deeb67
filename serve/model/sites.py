"""Adapted modules: each site of the base is wrapped once, by an instance attribute over its forward.

A site with no adapter in the batch costs one branch. Sites that read the same tensor (q/k/v, gate/up) form a group
with one shrink and one expand: the first member that is called computes all of them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from onebase.adapters.base import Site, SiteKind
from onebase.kernels.instructions import Placed, SiteWork
from onebase.kernels.ops.bottleneck import BlockBottleneck
from onebase.kernels.ops.instruction import wide
from onebase.kernels.ops.norm import NormOverride
from onebase.kernels.ops.tokens import SoftPrompt, TokenInstruction
from onebase.kernels.plan import BatchPlan
from onebase.serve.model.site_context import SiteContext

Forward = Callable[..., Any]


@dataclass(slots=True, eq=False)
class SiteGroup:
    """Linear sites that read one tensor, in the order in which the model calls them.

    The first that is called computes all of them, so that the group has one shrink and one expand; the others find
    their output here. members: their indices; linears: what computes them without low rank.
    """

    members: tuple[int, ...]
    linears: list[AdaptedLinear] = field(default_factory=list)
    source: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def output(self, x: Tensor, site: int, plan: BatchPlan, context: SiteContext) -> Tensor:
        """What the site gives for x [.., in_features]."""
        if self.source is not x or site not in self.outputs:
            self.source, self.outputs = x, self._compute(x, plan, context)
        y = self.outputs.pop(site)
        if not self.outputs:
            self.source = None
        return y

    def _compute(self, x: Tensor, plan: BatchPlan, context: SiteContext) -> dict[int, Tensor]:
        origins: dict[int, Tensor] = {}
        ys = [linear.without_low_rank(x, plan, origins) for linear in self.linears]
        if not context.acts(plan).outputs.isdisjoint(self.members):
            shrunk = context.kernels.shrink(x.reshape(-1, x.shape[-1]), self.members, plan)
            rows = [y.view(-1, y.shape[-1]) for y in ys]
            context.kernels.expand_group(rows, shrunk, self.members, plan, origins)
        return dict(zip(self.members, ys, strict=True))


@dataclass(frozen=True, slots=True)
class ProbedSite:
    """What the probe forward saw of a linear module or an embedding. group: positions (in call order) of sites with the
    same input. is_head: it gives the logits; is_input: it reads the token ids."""

    site: Site
    module: nn.Module
    group: tuple[int, ...]
    is_head: bool = False
    is_input: bool = False


@dataclass(frozen=True, slots=True)
class ProbedNorm:
    """A norm. feeds: paths of the blocks that read its output, whose residual stream is its input."""

    site: Site
    module: nn.Module
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbedBlock:
    """An attention or feed-forward module as a whole, or one of experts."""

    site: Site
    module: nn.Module

    def adapted(self, context: SiteContext) -> Forward:
        """The module's forward behind its adapters."""
        return AdaptedBlock(self.module.forward, self.site.path, context)


@dataclass(frozen=True, slots=True)
class ProbedLayer(ProbedBlock):
    """A whole decoder layer."""

    def adapted(self, context: SiteContext) -> Forward:
        return AdaptedLayer(self.module.forward, self.site.path, context)


def wrap_sites(
    probed: Sequence[ProbedSite], norms: Sequence[ProbedNorm], blocks: Sequence[ProbedBlock], context: SiteContext
) -> None:
    """Put every site's forward behind its adapters. Index in ``probed`` = site index in the tables."""
    groups: dict[tuple[int, ...], SiteGroup] = {}
    for index, entry in enumerate(probed):
        base: Forward = entry.module.forward
        if entry.site.kind is SiteKind.EMBEDDING:
            entry.module.forward = AdaptedEmbedding(base, index, entry, context)
        else:
            group = groups.setdefault(entry.group, SiteGroup(entry.group))
            linear = AdaptedLinear(base, index, entry, group, context)
            group.linears.append(linear)
            entry.module.forward = linear
    for norm in norms:
        norm.module.forward = AdaptedNorm(norm.module.forward, norm, context)
    for block in blocks:
        block.module.forward = block.adapted(context)


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLinear:
    """Forward of a linear site."""

    base: Forward
    index: int
    entry: ProbedSite
    group: SiteGroup
    context: SiteContext

    def __call__(self, x: Tensor) -> Tensor:
        plans = self.context.plans
        plan = plans.logits if self.entry.is_head else plans.rows
        if plan is None:
            y: Tensor = self.base(x)
            return y
        return self.group.output(x, self.index, plan, self.context)

    def without_low_rank(self, x: Tensor, plan: BatchPlan, origins: dict[int, Tensor]) -> Tensor:
        """The base's output, with what instructions add; into ``origins`` what it was, where maps will read that."""
        context, path = self.context, self.entry.site.path
        plain = not self.entry.is_head and not context.touches(path)
        work = None if plain else context.instructions.work(path, plan, x.device)
        acts = context.acts(plan)
        if work is None and self.index not in acts.inputs:
            y: Tensor = self.base(x)
            return y
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(self._input(rows, work, plan).view(x.shape))
        if work is not None and work.changes_output:
            flat = y.view(-1, y.shape[-1])
            if self.index in acts.maps:
                origins[self.index] = flat.clone()
            work.change_output(flat, rows)
        return y

    def _input(self, rows: Tensor, work: SiteWork | None, plan: BatchPlan) -> Tensor:
        """What the base is to read instead of rows [T, in_features]."""
        changed = rows if work is None else work.change_input(rows)
        if self.index in self.context.acts(plan).inputs:
            changed = rows.clone() if changed is rows else changed
            self.context.kernels.scale_in(changed, rows, self.index, plan)
        return changed


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedEmbedding:
    """Forward of an embedding site. Virtual tokens get their rows last: low rank has nothing to say of them."""

    base: Forward
    index: int
    entry: ProbedSite
    context: SiteContext

    def __call__(self, tokens: Tensor) -> Tensor:
        context, plan = self.context, self.context.plans.rows
        y: Tensor = self.base(tokens)
        if plan is None:
            return y
        rows, touched = y.view(-1, y.shape[-1]), context.touches(self.entry.site.path)
        work = context.instructions.work(self.entry.site.path, plan, rows.device) if touched else None
        if work is not None:
            work.change_output(rows, rows)
        if touched:
            self._replace(rows, tokens, virtual=False)
        if context.tables.active(self.index, plan):
            context.kernels.token_low_rank(rows, tokens.reshape(-1), self.index, plan)
        if touched:
            self._replace(rows, tokens, virtual=True)
        return y

    def _replace(self, rows: Tensor, tokens: Tensor, *, virtual: bool) -> None:
        kinds = [item for item in self.context.placed(self.entry.site.path) if isinstance(item.op, TokenInstruction)]
        placed = [item for item in kinds if isinstance(item.op, SoftPrompt) is virtual]
        raw = self.context.plans.tokens
        ids = raw if self.entry.is_input and raw is not None else tokens.reshape(-1)
        _replace(rows, placed, lambda item, at, old: item.op.apply(ids[at], old))  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedNorm:
    """Forward of a norm. An override runs the base's own forward over a copy of the module with other parameters."""

    base: Forward
    entry: ProbedNorm
    context: SiteContext

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.context.plans.rows is None:
            return y
        for block in self.entry.feeds:
            if any(isinstance(item.op, BlockBottleneck) for item in self.context.placed(block)):
                self.context.residuals[block] = x
        placed = self.context.placed(self.entry.site.path)
        if placed:  # some models have dropped the batch's dimension here (OPT)
            rows, source = (y[0], x[0]) if x.dim() > 2 else (y, x)
            _replace(rows, placed, lambda item, at, _: self._override(item, source[at][None])[0])
        return y

    def _override(self, item: Placed, x: Tensor) -> Tensor:
        assert isinstance(item.op, NormOverride)
        y: Tensor = forward_with(self.entry.module, {"weight": item.op.weight, "bias": item.op.bias}, x)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedBlock:
    """Forward of an attention or feed-forward module as a whole."""

    base: Forward
    path: str
    context: SiteContext

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        if not self.context.touches(self.path):
            return out
        for at, delta in self.context.beside.pop(self.path, ()):
            y = (out[0] if isinstance(out, tuple) else out)[0]
            y[at] = (wide(y[at]) + delta).to(y.dtype)
        bottlenecks = [item for item in self.context.placed(self.path) if isinstance(item.op, BlockBottleneck)]
        if bottlenecks:
            y = out[0] if isinstance(out, tuple) else out
            self._add(y[0], self.context.residuals.pop(self.path)[0], bottlenecks)
        return out

    def _add(self, rows: Tensor, residual: Tensor, placed: Sequence[Placed]) -> None:
        ops = [item.op for item in placed if isinstance(item.op, BlockBottleneck)]
        at = [slice(item.segment.start, item.segment.stop) for item in placed]
        deltas = iter(BlockBottleneck.deltas(ops, [rows[i] for i in at], [residual[i] for i in at]))
        _replace(rows, placed, lambda item, at, old: wide(old) + next(deltas))


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """Forward of a whole decoder layer: row instructions on its output."""

    base: Forward
    path: str
    context: SiteContext

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        plan = self.context.plans.rows
        if plan is not None and self.context.touches(self.path):
            y: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
            work = self.context.instructions.work(self.path, plan, y.device)
            if work is not None:
                work.change_output(y, y)
                self.context.sums.forget()  # the next layer's norm reads what it is now
        return out


def forward_with(module: nn.Module, parameters: Mapping[str, Tensor | None], x: Tensor) -> Any:
    """The module's own forward, unwrapped, over a copy of it that holds these of its parameters."""
    other = copy.copy(module)
    held = {name: parameters.get(name, kept) for name, kept in module._parameters.items()}
    object.__setattr__(other, "_parameters", held)
    return type(other).forward(other, x)


def _replace(y: Tensor, placed: Sequence[Placed], new: Callable[[Placed, slice, Tensor], Tensor]) -> None:
    """Rows of y [T, ...] become ``new(item, rows, old rows)``, in place; with a scale or several programs on a row, the
    differences from the old rows add up."""
    alone = all(one.segment.stop <= two.segment.start for one, two in itertools.pairwise(placed))
    old = y if alone else y.clone()
    for item in placed:
        at = slice(item.segment.start, item.segment.stop)
        rows = new(item, at, old[at])
        if alone and item.segment.scale == 1:
            y[at] = rows
        else:
            y[at] = (wide(y[at]) + item.segment.scale * (wide(rows) - wide(old[at]))).to(y.dtype)
