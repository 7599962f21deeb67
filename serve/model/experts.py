"""Routed experts behind adapters: rows with low-rank terms go through their experts here, others through the module.

A module of experts is one whose weights are stacked in 3-D parameters (``gate_up_proj`` or ``up_proj``, ``down_proj``)
and whose forward takes (hidden states, chosen experts, routing weights). What lies between the two products is the
module's own; that the rest is too is proven at load, by one forward on random rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.base import ExpertParameter, Experts
from onebase.kernels.instructions import Placed
from onebase.kernels.ops.experts import ExpertLowRank
from onebase.kernels.ops.instruction import wide
from onebase.serve.model.site_context import SiteContext
from onebase.serve.model.sites import Forward, ProbedBlock

_GATE_OF = {"gate_up_proj": "_apply_gate", "up_proj": "act_fn"}  # the module's own function between the two products
_DOWN_NAME = "down_proj"
_PROOF_ROWS = 8


@dataclass(frozen=True, slots=True)
class ProbedExperts(ProbedBlock):
    """A module of experts and its shape."""

    experts: Experts

    def adapted(self, context: SiteContext) -> Forward:
        return AdaptedExperts(self.module.forward, self, context)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows with the same instructions. start, stop: among the step's rows."""

    start: int
    stop: int
    placed: tuple[Placed, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlan:
    """The rows of a plan that are adapted at a site. rows: [n] int64, their places among the step's rows; run_of: [n]
    int64, the run of each; others: the remaining rows."""

    runs: tuple[Run, ...]
    rows: Tensor
    run_of: Tensor
    others: Tensor

    @classmethod
    def of(cls, placed: Sequence[Placed], num_rows: int, device: torch.device) -> ExpertPlan:
        """One upload for each of the three."""
        runs = tuple(split_runs(placed))
        lengths = torch.tensor([run.stop - run.start for run in runs])
        rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        rest = torch.ones(num_rows, dtype=torch.bool).index_fill_(0, rows, False).nonzero().flatten()
        run_of = torch.repeat_interleave(torch.arange(len(runs)), lengths)
        return cls(runs, *(tensor.to(device, non_blocking=True) for tensor in (rows, run_of, rest)))


def split_runs(placed: Sequence[Placed]) -> Iterator[Run]:
    """Cut the rows wherever a segment starts or stops: between two cuts every row has the same instructions."""
    cuts = sorted({cut for item in placed for cut in (item.segment.start, item.segment.stop)})
    for start, stop in itertools.pairwise(cuts):
        inside = tuple(item for item in placed if item.segment.start <= start and stop <= item.segment.stop)
        if inside:
            yield Run(start, stop, inside)


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedExperts:
    """Forward of a module of experts."""

    base: Forward
    entry: ProbedExperts
    context: SiteContext

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        plan, placed = self.context.plans.rows, self.context.placed(self.entry.site.path)
        if plan is None or not placed:
            y: Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return y
        todo = plan.memo((self, "experts"), lambda: ExpertPlan.of(placed, plan.num_rows, hidden_states.device))
        given = (hidden_states, top_k_index, top_k_weights)
        y = torch.empty_like(hidden_states)
        if len(todo.others):
            y[todo.others] = self.base(*(tensor[todo.others] for tensor in given))
        x, index, weights = (tensor[todo.rows] for tensor in given)
        module, experts = self.entry.module, self.entry.experts
        y[todo.rows] = through_experts(module, experts, x, index, weights, todo.run_of, todo.runs)
        return y


def through_experts(
    module: nn.Module, experts: Experts, x: Tensor, index: Tensor, weights: Tensor, run_of: Tensor, runs: Sequence[Run]
) -> Tensor:
    """x [n, width] through the experts index [n, k], weighted by weights [n, k], with the terms of each row's run.

    Rows are sorted by expert and run, so that an expert's weight is read once and each term is one pair of products.
    One synchronisation with the device: the number of rows of every expert and run. An index behind the last expert
    is no expert, and gives nothing.
    """
    k, num_runs = index.shape[1], max(len(runs), 1)
    keys = (index * num_runs + run_of[:, None]).flatten()
    order = torch.argsort(keys, stable=True)
    size = experts.num_experts * num_runs
    counts = torch.bincount(keys, minlength=size)[:size].view(-1, num_runs).tolist()
    done, parts = 0, [x.new_zeros(0, x.shape[1])]
    for expert, by_run in enumerate(counts):
        if total := sum(by_run):
            source = x[order[done : done + total] // k]
            some = [(length, run) for length, run in zip(by_run, runs, strict=False) if length]
            parts.append(_one_expert(module, experts, expert, source, some))
            done += total
    out = x.new_zeros(len(order), x.shape[1], dtype=torch.promote_types(x.dtype, weights.dtype))
    order = order[:done]
    out[order] = torch.cat(parts) * weights.flatten()[order, None]
    return out.view(-1, k, x.shape[1]).sum(1).to(x.dtype)


def _one_expert(
    module: nn.Module, experts: Experts, expert: int, x: Tensor, by_run: Sequence[tuple[int, Run]]
) -> Tensor:
    """Rows [n, width] of one expert, by run, through its two products: [n, width]."""
    inner = _product(module, experts.up, expert, x, by_run)
    gate: Any = getattr(module, _GATE_OF[experts.up.name])
    return _product(module, experts.down, expert, gate(inner), by_run)


def _product(
    module: nn.Module, parameter: ExpertParameter, expert: int, x: Tensor, by_run: Sequence[tuple[int, Run]]
) -> Tensor:
    """x [n, in] times the expert's matrix, plus its bias and the terms: [n, out]."""
    weight = getattr(module, parameter.name)[expert]
    bias = getattr(module, f"{parameter.name}_bias", None)
    weight = weight.T if parameter.transposed else weight
    y = nn.functional.linear(x, weight, None if bias is None else bias[expert])
    start = 0
    for length, run in by_run:
        rows = slice(start, start + length)
        start += length
        deltas = [
            item.op.delta(x[rows], expert) * item.segment.scale
            for item in run.placed
            if isinstance(item.op, ExpertLowRank) and item.op.parameter == parameter.name
        ]
        if deltas:
            y[rows] = sum(deltas, wide(y[rows])).to(y.dtype)
    return y


def experts_of(module: nn.Module, per_token: int) -> Experts | None:
    """The shape of a module of experts; None where it is none."""
    own = dict(module.named_parameters(recurse=False))
    up_name = next((name for name in _GATE_OF if name in own), None)
    if up_name is None or _DOWN_NAME not in own or own[up_name].dim() != 3 or own[_DOWN_NAME].dim() != 3:
        return None
    if not hasattr(module, _GATE_OF[up_name]):
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    up, down = (_parameter(name, own, transposed) for name in (up_name, _DOWN_NAME))
    interleaved = not getattr(module, "is_concatenated", True)
    return Experts(own[up_name].shape[0], per_token, up, down, tuple(own), interleaved)


def _parameter(name: str, own: Mapping[str, Tensor], transposed: bool) -> ExpertParameter:
    rows, columns = own[name].shape[1:]
    return ExpertParameter(name, *((rows, columns) if transposed else (columns, rows)), transposed)


@torch.inference_mode()
def difference(module: nn.Module, experts: Experts, arguments: Sequence[Tensor]) -> float:
    """How far ``through_experts`` is from the module's own forward on random rows, as a share of their deviation.

    arguments: what the module was called with; the rows, experts and weights drawn here have their types and widths.
    """
    hidden, index, weights = arguments
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROOF_ROWS, hidden.shape[1], generator=generator).to(hidden)
    scores = torch.rand(_PROOF_ROWS, experts.num_experts, generator=generator)
    best, chosen = (part.to(weights.device) for part in scores.topk(experts.per_token))
    given = (x, chosen.to(index.dtype), best.to(weights.dtype))
    expected = module(*given).float()
    runs = torch.zeros(_PROOF_ROWS, dtype=torch.int64, device=x.device)
    got = through_experts(module, experts, *given, runs, ()).float()
    return float((got - expected).abs().max() / expected.std())
