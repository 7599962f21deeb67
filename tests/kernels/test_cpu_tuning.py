"""What is measured at start: a choice of ways that makes sense, whatever the machine is doing meanwhile."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from onebase.kernels import bags
from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_split import CpuSplit, Ways
from onebase.kernels.cpu_tuning import CpuTuning, _plausible, measured
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape


def tables_of(programs: int, dtype: torch.dtype) -> ProgramTables:
    tables = ProgramTables(torch.randn(1 << 20).to(dtype), (SiteShape(576, 576),))
    for handle in range(programs):
        tables.install(handle, {0: Operands(32, 1.0, 0, 1 << 19)})
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_is_measured_and_all_figures_are_plausible(dtype: torch.dtype) -> None:
    tuning = measured(dtype)
    assert measured(dtype) is tuning
    assert _plausible(tuning) == tuning
    assert all(value is None or value > 0 for value in asdict(tuning).values())


def test_a_stall_during_the_measurement_does_not_decide() -> None:
    stalled = _plausible(CpuTuning(call=1e6, gather=0.0, per_mac=-1.0))
    assert (stalled.call, stalled.gather, stalled.per_mac) == (120.0, 0.625, 1 / 200e3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_choice_for_many_programs_and_for_a_prompt(dtype: torch.dtype) -> None:
    """One row each is no work for lone products, a prompt is none for gathers: on any machine."""
    split = CpuSplit(tables_of(17, dtype), measured(dtype))
    decode = [(1, ((handle, 1.0),)) for handle in range(16)]
    ways = split.ways(BatchPlan.from_runs([*decode, (2000, ((16, 1.0),))]))
    assert {segment.handle for segment in (*ways.gathered, *ways.masked)} == set(range(16))


def test_without_the_gathers_operator_the_other_ways_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "supported", lambda: False)
    tables = tables_of(16, torch.float32)
    body, plan = CpuKernels(tables, compiled=False), BatchPlan.from_rows([((handle, 1.0),) for handle in range(16)])
    x, y = torch.randn(16, 576), torch.zeros(16, 576)
    body.expand(y, body.shrink(x, (0,), plan), 0, plan)
    a, b = tables.factors(0, tables.operands(0)[0])
    torch.testing.assert_close(y, x @ a.T @ b, rtol=1e-3, atol=1e-2)


def test_no_segments_no_ways() -> None:
    assert CpuSplit(tables_of(1, torch.float32), CpuTuning()).ways(BatchPlan(3)) == Ways()
