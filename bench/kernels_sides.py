"""The same low-rank work in five ways: our kernels, and what one would write otherwise; the base's product beside.

Every side is a function of no arguments that works through all copies of a case's site. What it needs is prepared
before: padding is not counted against those that need it, but what they must do at every step is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from onebase.bench.kernels_case import World
from onebase.kernels import prepack
from onebase.kernels.base import LowRankKernels
from onebase.kernels.fixed_plan import FixedPlan, class_of
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tiles import FEW_ROWS, num_parts

Side = Callable[[], None]
OURS, LOOP, GATHER, GROUPED, DENSE = "ours", "loop", "gather + bmm", "grouped_mm", "dense base"
SERVED = "ours, as captured"  # over a plan whose contents may change between replays, as the engine's graphs have it
_MOST_CAPTURED = 256  # rows of a decode graph
_MOST_GATHERED = 2 << 30  # bytes of factors that gather + bmm may copy per site; beyond it is not measured


def sides(world: World, kernels: LowRankKernels) -> Mapping[str, Side]:
    """Those that can run here, by name."""
    found = {OURS: _ours(world, kernels, world.plan), LOOP: _loop(world), DENSE: _dense(world)}
    if 2 * world.case.rows * max(world.case.ranks) * world.case.hidden * world.x.element_size() <= _MOST_GATHERED:
        found[GATHER] = _gather(world)
    if (captured := _captured(world, kernels)) is not None:
        found[SERVED] = captured
    if (grouped := _grouped(world)) is not None:
        found[GROUPED] = grouped
    return found


def _ours(world: World, kernels: LowRankKernels, plan: BatchPlan) -> Side:
    def run() -> None:
        for site in range(world.copies):
            kernels.expand(world.y, kernels.shrink(world.x, (site,), plan), site, plan)

    return run


def _captured(world: World, kernels: LowRankKernels) -> Side | None:
    """None where there is nothing to capture: other bodies, and rows that no decode graph is made for."""
    few = max(world.case.lengths) <= FEW_ROWS and world.case.rows <= _MOST_CAPTURED
    if kernels.name != "triton" or not few:
        return None
    tables, plan, rows = world.tables, world.plan, world.case.rows
    rank, parts = class_of(tables.largest_rank(plan)), class_of(num_parts(plan, tables))
    fixed = FixedPlan(tables, rows, max_tiles=rows, max_rank=rank, max_parts=parts)
    fixed.fill(plan)
    return _ours(world, kernels, fixed.plan)


def _loop(world: World) -> Side:
    factors = [world.factors(site) for site in range(world.copies)]
    rows = [(world.x[s.start : s.stop], world.y[s.start : s.stop]) for s in world.plan.segments]

    def run() -> None:
        for site in factors:
            for (x, y), (a, b) in zip(rows, site, strict=True):
                y.addmm_(functional.linear(x, a), b)

    return run


def _gather(world: World) -> Side:
    owners = torch.repeat_interleave(torch.tensor(world.case.lengths)).to(world.x.device)
    x, y = world.x[:, :, None], world.y[:, None]

    def run() -> None:
        for a, b in world.padded:
            xa = torch.bmm(a[owners], x)
            y.add_(torch.bmm(xa.transpose(1, 2), b[owners]))

    return run


def _grouped(world: World) -> Side | None:
    """None where torch has no grouped_mm for these tensors."""
    ends = torch.tensor(world.case.lengths).cumsum(0).to(world.x.device, torch.int32)

    def run() -> None:
        for a, b in world.padded:
            xa = functional.grouped_mm(world.x, a.transpose(1, 2), offs=ends)
            world.y.add_(functional.grouped_mm(xa, b, offs=ends))

    try:
        run()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return run


def _dense(world: World) -> Side:
    """As it is served: prepacked on a CPU."""
    hidden, x = world.case.hidden, world.x
    copies = max(1, min(world.copies, (1 << 28) // (hidden * hidden)))
    weights = [torch.empty((hidden, hidden), dtype=x.dtype, device=x.device).normal_() for _ in range(copies)]
    packed = x.device.type == "cpu" and prepack.supported(x.dtype)
    if packed:
        weights = [prepack.prepack(weight) for weight in weights]
    product: Callable[[Tensor, Tensor], Tensor] = prepack.product if packed else functional.linear

    def run() -> None:
        for at in range(world.copies):
            product(x, weights[at % copies])

    return run
