"""ProgramTables: what is installed is what the host and the device read."""

from __future__ import annotations

import pytest
import torch

from onebase.kernels.dispatch import select_kernels
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

SITES = (SiteShape(8, 4), SiteShape(6, 10))


def make(size: int = 200) -> ProgramTables:
    return ProgramTables(torch.arange(size, dtype=torch.float32), SITES)


def test_views_lie_where_the_offsets_say() -> None:
    tables = make()
    op = Operands(rank=2, scale=1.0, a=8, b=40, add_out=60)
    tables.install(0, {0: op})
    a, b = tables.factors(0, op)
    assert torch.equal(a, torch.arange(8.0, 24.0).view(2, 8))
    assert torch.equal(b, torch.arange(40.0, 48.0).view(2, 4))
    assert torch.equal(tables.add_out(0, op), torch.arange(60.0, 64.0))


def test_the_device_row_holds_the_operands() -> None:
    tables = make()
    tables.install(3, {1: Operands(rank=3, scale=1 / 3, a=5, b=40, add_out=7)})
    row = tables.device_table[tables.row(3)]
    assert row[1, :4].tolist() == [5, 40, 7, 3]
    assert row.view(torch.float64)[1, 4].item() == 1 / 3
    assert row[0, 2:4].tolist() == [-1, 0]


def test_rows_are_reused_and_the_table_grows_with_its_content() -> None:
    tables = make()
    for handle in range(16):
        tables.install(handle, {0: Operands(1, 1.0, handle, handle)})
    row = tables.row(5)
    tables.remove(5)
    tables.install(16, {})
    assert tables.row(16) == row
    assert tables.device_table[row, 0].tolist() == [0, 0, -1, 0, 0, -1, -1, 0, -1]
    tables.install(17, {0: Operands(1, 1.0, 77, 77)})
    assert tables.device_table.shape[0] == 32
    assert [tables.device_table[tables.row(h), 0, 0].item() for h in (0, 15, 17)] == [0, 15, 77]


def test_a_program_reads_nothing_of_its_neighbours() -> None:
    tables, op = make(), Operands(1, 1.0, a=16, b=24)
    tables.row_of({0: op}, range(16, 28))
    for block in (range(17, 28), range(16, 27)):
        with pytest.raises(ValueError, match="site 0"):
            tables.row_of({0: op}, block)


@pytest.mark.parametrize(
    ("site", "op", "field"),
    [
        (0, Operands(1, 1.0, 193, 0), "a "),
        (0, Operands(1, 1.0, 0, 197), "b "),
        (0, Operands(0, 1.0, 0, 0, add_out=197), "add_out"),
        (0, Operands(0, 1.0, 0, 0, add_out=-2), "add_out"),
        (0, Operands(1, 1.0, -1, 0), "a "),
        (0, Operands(-1, 1.0, 0, 0), "rank"),
        (0, Operands(1, float("inf"), 0, 0), "scale"),
        (2, Operands(0, 1.0, 0, 0), "site"),
        (-1, Operands(0, 1.0, 0, 0), "site"),
    ],
)
def test_operands_outside_the_buffer_are_refused_and_nothing_is_installed(site: int, op: Operands, field: str) -> None:
    tables = make()
    with pytest.raises(ValueError, match=field):
        tables.install(0, {site: op})
    tables.install(0, {})


def test_operands_that_just_fit_are_taken() -> None:
    make().install(0, {0: Operands(1, 1.0, 192, 196, add_out=196)})


def test_handles_are_never_reused() -> None:
    tables = make()
    tables.install(4, {})
    tables.remove(4)
    with pytest.raises(ValueError, match="handle"):
        tables.install(4, {})
    with pytest.raises(KeyError):
        tables.remove(4)


def test_active_and_max_rank() -> None:
    tables = make()
    tables.install(0, {0: Operands(3, 1.0, 0, 0)})
    tables.install(1, {0: Operands(5, 1.0, 0, 0)})
    plan = BatchPlan(2, (Segment(0, 1, 0),))
    assert tables.active(0, plan)
    assert not tables.active(1, plan)
    assert tables.max_rank((0, 1), plan) == 3
    assert tables.max_rank((1,), plan) == 0
    assert not tables.active(0, BatchPlan(2))


def test_a_plan_with_a_removed_program_is_refused_even_after_it_worked() -> None:
    tables = make()
    tables.install(0, {0: Operands(1, 1.0, 0, 0)})
    plan = BatchPlan(1, (Segment(0, 1, 0),))
    assert tables.active(0, plan)
    tables.remove(0)
    with pytest.raises(KeyError, match="not installed"):
        tables.active(0, plan)
    with pytest.raises(KeyError, match="not installed"):
        tables.uses(0, plan)


def test_token_operands_are_not_read_as_linear() -> None:
    tables = make()
    tables.install(0, {0: Operands(1, 1.0, 0, 0, token=True)})
    plan = BatchPlan(1, (Segment(0, 1, 0),))
    assert len(tables.uses(0, plan, token=True)) == 1
    with pytest.raises(ValueError, match="token"):
        tables.uses(0, plan)


def test_alignment_is_what_all_offsets_share() -> None:
    tables = make()
    tables.install(0, {0: Operands(1, 1.0, 8, 16)})
    assert tables.alignment == 4
    tables.install(1, {0: Operands(1, 1.0, 8, 17)})
    assert tables.alignment == 1


@pytest.mark.parametrize("buffer", [torch.zeros(2, 2), torch.zeros(8)[::2], torch.zeros(4, dtype=torch.int64)])
def test_only_a_flat_floating_buffer_is_taken(buffer: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="buffer"):
        ProgramTables(buffer, SITES)


def test_the_body_follows_the_device_and_unknown_ones_are_refused() -> None:
    tables = make()
    assert select_kernels(tables).name == "cpu"
    assert select_kernels(tables, "reference").name == "reference"
    with pytest.raises(ValueError, match="choice"):
        select_kernels(tables, "cuda")  # type: ignore[arg-type]
    meta = ProgramTables(torch.zeros(4, device="meta"), SITES)
    with pytest.raises(ValueError, match="choice"):
        select_kernels(meta, "cpu")
