"""Gathers in C: the same bits however rows are batched and split, the same pool of threads as torch, long rows too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from onebase.kernels import huge_pages
from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.native.library import available
from onebase.kernels.plan import BatchPlan, Uses
from onebase.kernels.reference import ReferenceKernels
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler")

SITES = (SiteShape(200, 1000), SiteShape(200, 77))
GROUP = (0, 1)
RANKS = (130, 1, 64, 0, 7)
GATHERED = CpuTuning(call=1e9, gather=0)


def tables_of(dtype: torch.dtype) -> ProgramTables:
    """A program for each of RANKS; every other one has a bias. Operands start at odd elements."""
    torch.manual_seed(0)
    tables, at = ProgramTables(torch.randn(1 << 19).to(dtype), SITES), 1
    for handle, rank in enumerate(RANKS):
        operands = {}
        for number, site in enumerate(SITES):
            b = at + rank * site.in_features
            bias = b + rank * site.out_features
            operands[number] = Operands(rank, 0.25 + handle, at, b, bias if handle % 2 else -1)
            at = bias + site.out_features + 1
        tables.install(handle, operands)
    return tables


def outputs(tables: ProgramTables, x: Tensor, rows: list[Uses]) -> list[Tensor]:
    body, plan = CpuKernels(tables, GATHERED), BatchPlan.from_rows(rows)
    ys = [torch.ones(len(rows), site.out_features, dtype=x.dtype) for site in SITES]
    body.expand_group(ys, body.shrink(x, GROUP, plan), GROUP, plan)
    return ys


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor: it is right on all, and fast on some."""
    monkeypatch.setattr("onebase.kernels.low_rank_native.has_wide_vectors", lambda: True)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, threads: int) -> None:
    """Alone its ranks and columns are split over threads, among many it stays in one."""
    tables = tables_of(dtype)
    rows: list[Uses] = [((0, 1.0),), ((2, 0.5), (1, -1.0)), ((1, 1.0),), ((4, 1.0), (0, 2.0)), ((3, 1.0),)] * 9
    x = torch.randn(len(rows), 200).to(dtype)
    together = outputs(tables, x, rows)
    for row, uses in enumerate(rows[:5]):
        for whole, alone in zip(together, outputs(tables, x[row : row + 1], [uses]), strict=True):
            assert torch.equal(whole[row], alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_rounds_once_as_the_reference_does(dtype: torch.dtype, threads: int) -> None:
    """For one program a row, both differ by less than a unit in the last place of what they sum up."""
    tables = tables_of(dtype)
    rows: list[Uses] = [((handle, 1.0),) for handle in range(len(RANKS))]
    x = torch.randn(len(rows), 200).to(dtype)
    reference, plan = ReferenceKernels(tables), BatchPlan.from_rows(rows)
    wanted = [torch.ones(len(rows), site.out_features, dtype=dtype) for site in SITES]
    reference.expand_group(wanted, reference.shrink(x, GROUP, plan), GROUP, plan)
    for mine, want in zip(outputs(tables, x, rows), wanted, strict=True):
        close = torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 else 64)
        torch.testing.assert_close(mine, want, rtol=close, atol=close * float(want.abs().max()))


def test_tables_that_grew_are_found() -> None:
    tables = tables_of(torch.float32)
    body, plan = CpuKernels(tables, GATHERED), BatchPlan.from_rows([((0, 1.0),)])
    x, first = torch.randn(1, 200), torch.zeros(1, 77)
    body.expand(first, body.shrink(x, GROUP, plan), 1, plan)
    old = tables.device_table
    for handle in range(len(RANKS), 40):
        tables.install(handle, {})
    assert tables.device_table is not old
    old.fill_(-1)
    again = torch.zeros(1, 77)
    body.expand(again, body.shrink(x, GROUP, plan), 1, plan)
    assert torch.equal(first, again)


def test_there_is_one_pool_of_threads() -> None:
    """A second OpenMP beside torch's would run as many threads again, and both would wait for each other."""
    script = (
        "import torch\n"
        "from onebase.kernels.native.library import native\n"
        "assert native(torch.float32) is not None\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]}\n"
        "print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1"]


@pytest.mark.parametrize("size", [0, 5, (1 << 21) + 3])
def test_advice_on_pages_changes_no_byte(size: int) -> None:
    buffer = torch.arange(size, dtype=torch.int32)[1:] if size else torch.empty(0)
    before = buffer.clone()
    huge_pages.advise(buffer)
    assert torch.equal(buffer, before)
