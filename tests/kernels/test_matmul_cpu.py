"""The CPU body's packs under changing membership: never stale, never contaminated, bounded."""

from __future__ import annotations

import gc
import math
import random

import pytest
import torch
from torch import Tensor

from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_split import CpuSplit, Ways
from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.packs import PANEL_PROGRAMS, SitePack
from onebase.kernels.plan import BatchPlan, Segment
from onebase.kernels.reference import ReferenceKernels
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

SITES = (SiteShape(32, 24), SiteShape(32, 16))
MAX_RANK = 24
BLOCK = MAX_RANK * (32 + 24) + 24  # room for one program at one site
MASKED = CpuTuning(call=1e9, mask=0, gather=1e12, prepack_after=2)
GATHERED = CpuTuning(call=1e9, gather=0)
TUNINGS = {
    "masked": MASKED,
    "gathered": GATHERED,
    "native": GATHERED,
    "auto": CpuTuning(),
    "solo": CpuTuning(call=0, mask=1e9, gather=1e9),
}


class Server:
    """Slots of an arena that programs come to and leave; blocks are overwritten as soon as they are free."""

    def __init__(
        self, slots: int, tuning: CpuTuning = MASKED, dtype: torch.dtype = torch.float32, *, compiled: bool = False
    ) -> None:
        self.buffer = torch.full((slots * len(SITES) * BLOCK,), float("nan"), dtype=dtype)
        self.tables = ProgramTables(self.buffer, SITES)
        self.body = CpuKernels(self.tables, tuning, compiled=compiled)
        self.reference = ReferenceKernels(self.tables)
        self.slot: dict[int, int] = {}
        self.free = list(range(slots))
        self.next_handle = 0

    def load(self, rank: int, *, sites: tuple[int, ...] = (0, 1), bias: bool = False) -> int:
        handle, slot = self.next_handle, self.free.pop()
        self.next_handle += 1
        ops = {}
        for site in sites:
            start = (slot * len(SITES) + site) * BLOCK
            self.buffer[start : start + BLOCK].normal_()
            b = start + rank * SITES[site].in_features
            ops[site] = Operands(rank, 1 + handle % 3, start, b, start + BLOCK - 24 if bias else -1)
        self.tables.install(handle, ops)
        self.slot[handle] = slot
        return handle

    def unload(self, handle: int) -> None:
        self.body.forget(handle)
        self.tables.remove(handle)
        slot = self.slot.pop(handle)
        self.buffer[slot * len(SITES) * BLOCK :][: len(SITES) * BLOCK] = float("nan")
        self.free.append(slot)

    def check(self, plan: BatchPlan, x: Tensor | None = None) -> None:
        x = torch.randn(plan.num_rows, 32, dtype=self.buffer.dtype) if x is None else x
        mine, wanted = self.body.shrink(x, (0, 1), plan), self.reference.shrink(x, (0, 1), plan)
        for site, shape in enumerate(SITES):
            y = torch.randn(plan.num_rows, shape.out_features, dtype=self.buffer.dtype)
            want = y.clone()
            self.body.expand(y, mine, site, plan)
            self.reference.expand(want, wanted, site, plan)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)


def packs_of(tables: ProgramTables) -> list[SitePack]:
    """Every pack that is alive for these tables, whoever keeps it."""
    return [found for found in gc.get_objects() if type(found) is SitePack and found._tables is tables]


def pack_bytes(tables: ProgramTables) -> int:
    """Host memory of the packs."""
    held = [tensor for pack in packs_of(tables) for tensor in (pack._a, pack._b, *(pack._prepacked or ()))]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def random_plan(rng: random.Random, handles: list[int]) -> BatchPlan:
    chosen = sorted(rng.sample(handles, rng.randint(1, len(handles))))
    runs = [(rng.choice((1, 1, 1, 2, 9)), ((handle, rng.choice((1.0, 0.5))),)) for handle in chosen]
    if rng.random() < 0.3:
        runs.insert(rng.randrange(len(runs)), (2, ()))
    if rng.random() < 0.3:
        runs.append((1, tuple((handle, 0.5) for handle in rng.sample(handles, min(2, len(handles))))))
    return BatchPlan.from_runs(runs)


@pytest.mark.parametrize("name", TUNINGS)
def test_churn_never_serves_stale_data(name: str) -> None:
    rng, server, plans = random.Random(3), Server(40, TUNINGS[name], compiled=name == "native"), list[BatchPlan]()
    torch.manual_seed(0)
    for _ in range(300):
        if server.free and (not server.slot or rng.random() < 0.5):
            sites = rng.choice(((0, 1), (0, 1), (0,), (1,), ()))
            server.load(rng.choice((0, 1, 3, 8, 16, MAX_RANK)), sites=sites, bias=rng.random() < 0.3)
        elif server.slot and rng.random() < 0.6:
            gone = rng.choice(list(server.slot))
            plans = [plan for plan in plans if gone not in plan.handles]
            server.unload(gone)
        if server.slot:
            plans = [*plans[-5:], random_plan(rng, list(server.slot))]
        for plan in rng.sample(plans, min(2, len(plans))):
            server.check(plan)


@pytest.mark.parametrize("name", ["masked", "gathered", "native"])
def test_two_plans_in_turn_share_packs_without_mixing(name: str) -> None:
    server = Server(8, TUNINGS[name], compiled=name == "native")
    handles = [server.load(rank) for rank in (8, 16, 24, 3, 8, 1)]
    first = BatchPlan.from_rows([((handle, 1.0),) for handle in handles[:4]])
    second = BatchPlan.from_rows([((handle, 1.0),) for handle in handles[2:]])
    for _ in range(6):
        server.check(first)
        server.check(second)


@pytest.mark.parametrize("ranks", [(1,), (1, 8, MAX_RANK)])
def test_one_leaves_and_one_enters_keeps_packs_small(ranks: tuple[int, ...]) -> None:
    server = Server(24)
    for _ in range(16):
        server.load(MAX_RANK)
    for turn in range(60):
        server.unload(min(server.slot))
        server.load(ranks[turn % len(ranks)])
        server.check(BatchPlan.from_rows([((handle, 1.0),) for handle in server.slot]))
        live = sum(server.tables.operands(handle)[0].rank for handle in server.slot)
        columns = live + live // 4 + 4 * 32
        assert pack_bytes(server.tables) <= columns * sum(site.in_features + site.out_features for site in SITES) * 4


def test_forgetting_everything_frees_the_packs() -> None:
    """Even while others keep the plans."""
    server = Server(4)
    handles = [server.load(8) for _ in range(4)]
    plan = BatchPlan.from_rows([((handle, 1.0),) for handle in handles])
    server.check(plan)
    assert pack_bytes(server.tables) > 0
    for handle in handles:
        server.unload(handle)
    assert pack_bytes(server.tables) == 0
    assert plan.handles == set(handles)


def test_prompts_between_decode_steps_do_not_delay_prepacking() -> None:
    """A prompt reads the arena and leaves the packs of the decoding rows as they stand, prepacked or counting."""
    server = Server(17, CpuTuning(gather=1e12, prepack_after=4))
    handles = [server.load(MAX_RANK) for _ in range(17)]
    decode = [(1, ((handle, 1.0),)) for handle in handles[:16]]
    plans = [BatchPlan.from_runs(decode), BatchPlan.from_runs([*decode, (3000, ((handles[16], 1.0),))])]
    for turn in range(6):
        server.check(plans[turn % 2])
    (pack,) = [pack for pack in packs_of(server.tables) if pack._site == 0]
    assert pack._prepacked is not None


def test_plans_that_are_kept_do_not_keep_dissolved_packs() -> None:
    server = Server(3 * PANEL_PROGRAMS, CpuTuning(call=1e9, mask=0, gather=1e12))  # none is prepacked so soon
    handles = [server.load(4) for _ in range(3 * PANEL_PROGRAMS)]
    thirds = [handles[i::3] for i in range(3)]
    plans = [BatchPlan.from_rows([((handle, 1.0),) for handle in third]) for third in thirds]
    server.check(plans[0])
    one = pack_bytes(server.tables)
    for plan in [*plans, *plans]:
        server.check(plan)
        assert pack_bytes(server.tables) == one


@pytest.mark.parametrize("name", ["masked", "gathered", "native"])
def test_sites_that_differ_only_in_a_scale_do_not_share_it(name: str) -> None:
    server = Server(2, TUNINGS[name], compiled=name == "native")
    server.buffer.normal_()
    for handle, scales in enumerate(((1.0, 3.0), (0.5, 0.5))):
        ops = {site: Operands(3, scale, site * BLOCK, site * BLOCK + 96) for site, scale in enumerate(scales)}
        server.tables.install(handle, ops)
    server.check(BatchPlan.from_rows([((0, 1.0),), ((1, 2.0),)]))


def test_groups_of_equal_kind_and_unequal_width_do_not_share_addresses() -> None:
    """Their samples step through A by different widths."""
    buffer = torch.randn(1 << 14)
    tables = ProgramTables(buffer, (SiteShape(32, 24), SiteShape(48, 24)))
    for handle in range(3):
        tables.install(handle, {site: Operands(5, 1.0, 640 * handle + 64 * site, 4096) for site in range(2)})
    body, reference = CpuKernels(tables, GATHERED, compiled=False), ReferenceKernels(tables)
    plan = BatchPlan.from_rows([((handle, 1.0),) for handle in range(3)])
    for site, shape in enumerate(tables.sites):
        x, y, want = torch.randn(3, shape.in_features), torch.zeros(3, 24), torch.zeros(3, 24)
        body.expand(y, body.shrink(x, (site,), plan), site, plan)
        reference.expand(want, reference.shrink(x, (site,), plan), site, plan)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["masked", "gathered", "native"])
def test_sites_that_differ_only_in_a_rank_do_not_share_a_mask(name: str) -> None:
    server = Server(1, TUNINGS[name], compiled=name == "native")
    server.buffer.normal_()
    server.tables.install(0, {0: Operands(3, 1.0, 0, 96), 1: Operands(8, 1.0, BLOCK, BLOCK + 256)})
    server.tables.install(1, {})
    server.check(BatchPlan.from_rows([((0, 1.0),), ((1, 1.0),)]))


@pytest.mark.parametrize("name", ["masked", "gathered", "native"])
def test_sites_that_differ_only_in_the_program_do_not_share_a_mask(name: str) -> None:
    server = Server(2, TUNINGS[name], compiled=name == "native")
    first, second = server.load(3, sites=(0,)), server.next_handle + 2
    server.tables.install(second, {1: Operands(3, 1.0, 0, 96)})
    server.buffer[:BLOCK].normal_()
    server.check(BatchPlan.from_rows([((first, 1.0), (second, 0.5))]))


@pytest.mark.parametrize("name", ["masked", "gathered", "native"])
def test_more_programs_than_a_panel_holds(name: str) -> None:
    server = Server(3 * PANEL_PROGRAMS, TUNINGS[name], compiled=name == "native")
    handles = [server.load(4) for _ in range(3 * PANEL_PROGRAMS)]
    random.Random(0).shuffle(handles)
    server.check(BatchPlan.from_rows([((handle, 1.0),) for handle in handles]))
    server.check(BatchPlan.from_rows([((handle, 1.0),) for handle in handles[:5]]))
    server.check(BatchPlan.from_rows([((handle, 1.0),) for handle in handles]))


@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("value", [3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["masked", "gathered", "native"])
def test_a_neighbour_that_overflows_does_not_reach_other_rows(name: str, part: str, value: float) -> None:
    server = Server(3, TUNINGS[name], compiled=name == "native")
    bad, good, other = (server.load(8) for _ in range(3))
    for site, op in server.tables.operands(bad).items():
        server.tables.factors(site, op)[part == "b"].fill_(value)
    x = torch.ones(3, 32)
    plan = BatchPlan.from_rows([((bad, 1.0),), ((good, 1.0),), ((other, 1.0),)])
    without = BatchPlan.from_rows([(), ((good, 1.0),), ((other, 1.0),)])
    y, want = torch.zeros(3, 24), torch.zeros(3, 24)
    server.body.expand(y, server.body.shrink(x, (0,), plan), 0, plan)
    server.reference.expand(want, server.reference.shrink(x, (0,), without), 0, without)
    torch.testing.assert_close(y[1:], want[1:], rtol=1e-4, atol=1e-3)


def test_the_split_leaves_long_segments_and_lone_ones_to_themselves() -> None:
    buffer = torch.zeros(1 << 20)
    tables = ProgramTables(buffer, (SiteShape(576, 576),))
    for handle in range(16):
        tables.install(handle, {0: Operands(32, 1.0, 0, 0)})
    split = CpuSplit(tables, CpuTuning())
    decode = [(1, ((handle, 1.0),)) for handle in range(15)]
    plan = BatchPlan.from_runs([*decode, (500, ((15, 1.0),))])
    assert split.ways(plan) == Ways(gathered=plan.segments[:15])
    assert split.ways(BatchPlan(64, (Segment(0, 64, 3),))) == Ways()
    without = CpuSplit(tables, CpuTuning(gather=math.inf))
    assert without.ways(plan) == Ways(masked=plan.segments[:15])


@pytest.mark.parametrize("capacity", [0, 10, 40])
def test_programs_without_room_for_their_columns_go_by_themselves(capacity: int) -> None:
    server = Server(8, GATHERED)
    server.body._columns.capacity = capacity
    handles = [server.load(rank) for rank in (8, 16, MAX_RANK, 3, 0, 1)]
    plan = BatchPlan.from_rows([((handle, 1.0),) for handle in handles])
    for _ in range(2):
        server.check(plan)
    placed = server.body._columns.starts
    assert sum(server.tables.operands(handle)[0].rank for handle in placed) <= capacity
    server.unload(handles[0])
    server.check(BatchPlan.from_rows([((handle, 1.0),) for handle in handles[1:]]))
