"""Experts: the low-rank op against its reference, and a module's rows against one row and one expert at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onebase.adapters.base import ExpertParameter, Experts
from onebase.kernels.instructions import Placed
from onebase.kernels.ops.experts import ExpertLowRank, RouterLowRank
from onebase.kernels.plan import Segment
from onebase.serve.model.experts import ExpertPlan, experts_of, split_runs, through_experts

COUNT, TOP, WIDTH, INNER, RANK = 5, 2, 12, 8, 3


class Gated(nn.Module):
    """gate_up_proj and down_proj, either way round, with or without biases."""

    def __init__(self, transposed: bool, biased: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (COUNT, 2 * INNER, WIDTH), (COUNT, WIDTH, INNER)
        for name, shape in (("gate_up_proj", up), ("down_proj", down)):
            size = (shape[0], shape[2], shape[1]) if transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(size, dtype=torch.float64)))
            if biased:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(shape[:2], dtype=torch.float64)))

    def _apply_gate(self, inner: Tensor) -> Tensor:
        return inner[..., ::2] * torch.tanh(inner[..., 1::2])


class Plain(nn.Module):
    """up_proj and down_proj around an activation."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(COUNT, INNER, WIDTH, dtype=torch.float64))
        self.down_proj = nn.Parameter(torch.randn(COUNT, WIDTH, INNER, dtype=torch.float64))
        self.act_fn = nn.ReLU()


def _matrix(module: nn.Module, part: ExpertParameter, expert: int, placed: list[Placed]) -> Tensor:
    weight = getattr(module, part.name)[expert]
    weight = weight.T if part.transposed else weight
    for item in placed:
        op: Any = item.op
        if op.parameter == part.name:
            weight = weight + item.segment.scale * op.factor * op.b[expert].T @ op.a[expert]
    return weight


def _row(module: Any, experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor, placed: list[Placed]) -> Tensor:
    """One row by the definition: merged matrices, expert after expert. An index behind the last one is none."""
    out = torch.zeros_like(x)
    for expert, weight in zip(chosen.tolist(), weights, strict=True):
        if expert < experts.num_experts:
            inner = _matrix(module, experts.up, expert, placed) @ x
            inner = inner + (module.gate_up_proj_bias[expert] if hasattr(module, "gate_up_proj_bias") else 0)
            inner = module._apply_gate(inner) if hasattr(module, "_apply_gate") else module.act_fn(inner)
            y = _matrix(module, experts.down, expert, placed) @ inner
            out = out + weight * (y + (module.down_proj_bias[expert] if hasattr(module, "down_proj_bias") else 0))
    return out


def _op(part: ExpertParameter) -> ExpertLowRank:
    a, b = (torch.randn(COUNT, RANK, size, dtype=torch.float64) for size in (part.in_features, part.out_features))
    return ExpertLowRank(part.name, a, b, 0.7, TOP)


@torch.inference_mode()
@pytest.mark.parametrize(
    "make", [lambda: Gated(False, False), lambda: Gated(True, True), Plain], ids=["gated", "transposed", "plain"]
)
def test_rows_equal_the_definition(make: Any) -> None:
    """Rows 0 and 8 are the base's; rows 3 and 4 have two programs, one with a scale; one choice is no expert."""
    torch.manual_seed(0)
    module = make()
    experts = experts_of(module, TOP)
    assert experts is not None
    one, two = Segment(1, 4, 1), Segment(3, 5, 2, -0.5)
    ops = [Placed(one, _op(experts.up)), Placed(one, _op(experts.down)), Placed(two, _op(experts.down))]
    plan = ExpertPlan.of(ops, 9, torch.device("cpu"))
    assert plan.others.tolist() == [0, 8]
    x, weights = torch.randn(9, WIDTH, dtype=torch.float64), torch.rand(9, TOP, dtype=torch.float64)
    index = torch.stack([torch.randperm(COUNT)[:TOP] for _ in range(9)])
    index[4, 1] = COUNT
    got = through_experts(module, experts, x[plan.rows], index[plan.rows], weights[plan.rows], plan.run_of, plan.runs)
    for at, row in enumerate(plan.rows.tolist()):
        placed = [item for item in ops if item.segment.start <= row < item.segment.stop]
        expected = _row(module, experts, x[row], index[row], weights[row], placed)
        torch.testing.assert_close(got[at], expected, atol=1e-9, rtol=1e-9)


def test_runs_are_cut_where_segments_meet() -> None:
    op: Any = object()
    placed = [Placed(Segment(0, 2, 1), op), Placed(Segment(1, 3, 2), op), Placed(Segment(6, 1, 3), op)]
    runs = [(run.start, run.stop, len(run.placed)) for run in split_runs(placed)]
    assert runs == [(0, 1, 1), (1, 2, 2), (2, 4, 1), (6, 7, 1)]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_the_low_rank_equals_its_reference(dtype: torch.dtype, allowed: float) -> None:
    draw = torch.Generator().manual_seed(1)
    a, b, rows = (torch.randn(*size, generator=draw).to(dtype) for size in ((4, 3, 10), (4, 3, 6), (7, 10)))
    op = ExpertLowRank("up_proj", a, b, 0.5, 2)
    for expert in range(4):
        expected = op.reference(rows, expert)
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(op.delta(rows, expert).double() / scale, expected / scale, atol=allowed, rtol=0)
    assert (op.rank, op.flops) == (3, 2 * 2 * 3 * 16)


def test_the_routers_matrix() -> None:
    a, b = torch.randn(2, 6), torch.randn(2, 4)
    op = RouterLowRank(a, b, -1.5)
    torch.testing.assert_close(op.matrix(), -1.5 * torch.einsum("rd,re->ed", a, b))
    assert (op.rank, op.flops) == (2, 2 * 3 * 6 * 4)


def test_other_modules_are_no_experts() -> None:
    assert experts_of(nn.Linear(4, 4), TOP) is None
    flat = Plain()
    flat.up_proj = nn.Parameter(torch.randn(INNER, WIDTH))
    assert experts_of(flat, TOP) is None
    bare = Gated(False, False)
    assert experts_of(bare, TOP) is not None
    bare.down_proj = None
    assert experts_of(bare, TOP) is None
