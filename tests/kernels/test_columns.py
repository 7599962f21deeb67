"""The columns that gathers read: never two programs in one place, bounded, taken back."""

from __future__ import annotations

import random

import pytest
import torch

from onebase.kernels.columns import Columns
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

SITES = (SiteShape(8, 4), SiteShape(8, 2), SiteShape(30, 6))  # the last is an embedding
SIZE = 12000
CAPACITY = SIZE // 12


def make_tables(ranks: list[int]) -> ProgramTables:
    """Programs of these ranks; the second site has half of it, and every third program does not touch it."""
    tables = ProgramTables(torch.randn(SIZE), SITES)
    for handle, rank in enumerate(ranks):
        ops = {0: Operands(rank, 1.0, 0, handle * 8), 2: Operands(rank, 1.0, 0, 0, token=True)}
        if handle % 3:
            ops[1] = Operands(rank // 2, 1.0, 0, handle * 8)
        tables.install(handle, ops)
    return tables


def check(columns: Columns, tables: ProgramTables, ranks: list[int]) -> None:
    """Ranges do not overlap and hold what the arena holds."""
    taken: set[int] = set()
    for handle, start in columns.starts.items():
        mine = set(range(start, start + ranks[handle]))
        assert not taken & mine
        taken |= mine
        assert start + ranks[handle] <= columns.capacity
        for site, op in tables.operands(handle).items():
            if op.rank and not op.token:
                assert torch.equal(columns.matrix(site)[start : start + op.rank], tables.factors(site, op)[1])


def test_random_sets_come_and_go() -> None:
    rng = random.Random(0)
    ranks = [rng.choice((0, 1, 3, 16, 33)) for _ in range(40)]
    tables = make_tables(ranks)
    columns = Columns(tables)
    for _ in range(400):
        wanted = {handle: ranks[handle] for handle in rng.sample(range(40), rng.randint(1, 12))}
        assert columns.place(wanted) == wanted.keys()
        check(columns, tables, ranks)
        if rng.random() < 0.3:
            columns.forget(rng.randrange(40))


def test_a_program_in_use_stays_where_it_is() -> None:
    columns = Columns(make_tables([16] * 40))
    columns.place(dict.fromkeys(range(4), 16))
    before = dict(columns.starts)
    for newcomer in range(4, 40):
        columns.place({0: 16, 1: 16, newcomer: 16})
        assert {handle: columns.starts[handle] for handle in (0, 1)} == {handle: before[handle] for handle in (0, 1)}


def test_turnover_does_not_grow() -> None:
    """Idle programs give their room up before more is taken than a quarter above what is in use."""
    columns = Columns(make_tables([16] * 64))
    for first in range(48):
        columns.place(dict.fromkeys(range(first, first + 16), 16))
    assert columns.top <= 16 * 16 * 5 // 4 + 64


def test_the_oldest_idle_program_goes_first() -> None:
    columns = Columns(make_tables([16] * 64))
    columns.place(dict.fromkeys(range(8), 16))
    columns.place({0: 16})
    generation = columns.generation
    columns.place({0: 16, **dict.fromkeys(range(20, 24), 16)})
    assert columns.generation > generation
    assert 0 in columns.starts
    assert 7 in columns.starts
    assert 1 not in columns.starts


def test_what_finds_no_room_is_not_placed() -> None:
    ranks = [CAPACITY // 3] * 5
    columns = Columns(make_tables(ranks))
    assert len(columns.place(dict(enumerate(ranks)))) == 3
    assert len(columns.place({3: ranks[3], 4: ranks[4]})) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_memory_is_given_back_with_the_last_program(order: tuple[int, ...]) -> None:
    columns = Columns(make_tables([4, 4]))
    columns.place({0: 4, 1: 4})
    for handle in order:
        assert columns.top
        columns.forget(handle)
    assert not columns.top
    assert not columns._matrices


def test_one_that_lost_its_columns_and_got_others_does_not_stand() -> None:
    columns = Columns(make_tables([16] * 64))
    columns.place({0: 16, 1: 16})
    before = {0: columns.starts[0]}
    assert columns.stand(before)
    columns.forget(0)
    columns.place({1: 16, 2: 16})
    columns.place({0: 16, 1: 16, 2: 16})
    assert columns.starts[0] != before[0]
    assert not columns.stand(before)
