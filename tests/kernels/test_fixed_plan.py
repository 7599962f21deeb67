"""Kernels over a fixed plan, as a CUDA graph replays them: the same launches, other contents of the plan's buffer.

Without a GPU, launches are recorded once and repeated with the very same arguments under the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebase.kernels.fixed_plan import DoesNotFit, FixedPlan
from onebase.kernels.plan import BatchPlan, Run
from onebase.kernels.tables import Operands
from onebase.kernels.tiles import num_parts, tiles_of
from onebase.kernels.touched import Touched

from .matmul_worlds import GROUP, SITES, World, needs_interpreter
from .test_matmul import example_world

ROWS, TILES, RANK = 12, 12, 77
PLANS: dict[str, list[Run]] = {
    "one row each": [(1, ((h, 1.0),)) for h in (0, 1, 3)] * 4,
    "base only": [(5, ())],
    "no rows": [],
    "one long": [(12, ((3, 0.5),))],
    "fewer rows": [(1, ()), (2, ((1, -2.0),)), (1, ((0, 1.0),))],
    "two adapters on a row": [(2, ((0, 1.0), (1, -0.5))), (3, ((1, 1.0), (3, 2.0)))],
}


class Recorder:
    """Stands for a kernel: launches it, and can launch it again with the same arguments."""

    def __init__(self, kernel: Any, launches: list[Callable[[], None]]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._launches.append(lambda: self._kernel[grid](*args, **kwargs))
            self._launches[-1]()

        return launch


def capture(
    world: World, fixed: FixedPlan, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, list[torch.Tensor], list[Callable[[], None]]]:
    """x, the y of each site, and the launches; captured over an empty plan."""
    from onebase.kernels import matmul_triton

    launches: list[Callable[[], None]] = []
    for name in ("shrink_rows_kernel", "expand_rows_kernel"):
        monkeypatch.setattr(matmul_triton, name, Recorder(getattr(matmul_triton, name), launches))
    body = matmul_triton.TritonKernels(world.tables)
    x, ys = world.tensor(ROWS, SITES[0].in_features), [world.tensor(ROWS, SITES[site].out_features) for site in GROUP]
    shrunk = body.shrink(x, GROUP, fixed.plan)
    body.expand_group(ys, shrunk, GROUP, fixed.plan)
    return x, ys, launches


@needs_interpreter
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replays_do_what_the_buffer_says(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = example_world(dtype)
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK, num_layers=2)
    x, ys, launches = capture(world, fixed, monkeypatch)
    assert len(launches) == 1 + 2  # a shrink, and an expand for each adapter that a row may have
    for runs in [*PLANS.values(), *reversed(PLANS.values())]:
        fixed.fill(BatchPlan.from_runs(runs))
        rows = [uses for length, uses in runs for _ in range(length)]
        rows += [()] * (ROWS - len(rows))
        wanted = [world.expected(ys[site], x, site, rows) for site in GROUP]
        before = [y.clone() for y in ys]
        for launch in launches:
            launch()
        for site in GROUP:
            want, size = wanted[site]
            eps = torch.finfo(world.dtype).eps
            assert bool(((ys[site].double() - want).abs() <= 6 * eps * size).all()), (runs, site)
            bare = [row for row, uses in enumerate(rows) if not any(site in world.truth[h] for h, _ in uses)]
            assert torch.equal(ys[site][bare], before[site][bare])


@needs_interpreter
def test_parts_are_as_many_as_the_plans_need_not_as_one_rank_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    world = example_world("fp32")
    runs: list[Run] = [(1, ((1, 1.0),)), *[(1, ((0, 1.0),))] * 2, (1, ())]
    needed = num_parts(BatchPlan.from_runs(runs), world.tables)
    assert needed == 5 + 1 * 1, "rank 77, and two rows of rank 1 that share a tile"
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK, max_parts=needed)
    assert len(tiles_of(fixed.plan, world.tables).shrinks) == needed
    x, ys, launches = capture(world, fixed, monkeypatch)
    fixed.fill(BatchPlan.from_runs(runs))
    rows = [uses for length, uses in runs for _ in range(length)] + [()] * (ROWS - 4)
    wanted = [world.expected(ys[site], x, site, rows) for site in GROUP]
    for launch in launches:
        launch()
    for site, (want, size) in zip(GROUP, wanted, strict=False):
        assert bool(((ys[site].double() - want).abs() <= 1e-5 * size).all())


@needs_interpreter
def test_a_capture_over_an_empty_plan_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = example_world("fp32")
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK)
    _, ys, launches = capture(world, fixed, monkeypatch)
    before = [y.clone() for y in ys]
    for launch in launches:
        launch()
    assert all(torch.equal(y, kept) for y, kept in zip(ys, before, strict=True))


@pytest.mark.parametrize(
    ("what", "runs"),
    [
        ("rows", [(ROWS + 1, ())]),
        ("tiles", [(1, ((h, 1.0),)) for h in (0, 1, 0, 1)]),
        ("adapters on one row", [(1, ((0, 1.0), (1, 1.0)))]),
        ("the largest rank", [(1, ((3, 1.0),))]),
        ("parts of ranks", [(1, ((0, 1.0),)), (1, ((1, 1.0),)), (1, ((2, 1.0),))]),
    ],
)
def test_more_than_was_captured_is_refused_and_leaves_the_buffer(what: str, runs: list[Run]) -> None:
    max_parts = 2 if what == "parts of ranks" else None
    world = World(torch.float32, 0)
    for handle, rank in enumerate((1, 3, 3, 5)):
        world.add(handle, [rank, rank, None], [False] * 3)
    fixed = FixedPlan(world.tables, ROWS, max_tiles=3, max_rank=4, max_parts=max_parts)
    fixed.fill(BatchPlan.from_rows([((0, 1.0),), ((1, 1.0),)]))
    before = fixed._data.clone()
    with pytest.raises(ValueError, match=f"{what}: the batch has"):
        fixed.fill(BatchPlan.from_runs(runs))
    assert torch.equal(fixed._data, before)


def test_a_table_that_grew_since_the_capture_is_refused() -> None:
    world = example_world("fp32")
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK)
    for handle in range(10, 40):
        world.tables.install(handle, {0: Operands(0, 1.0, 0, 0)})
    with pytest.raises(ValueError, match="moved since the capture"):
        fixed.fill(BatchPlan.from_rows([((0, 1.0),)]))


def test_a_program_that_is_gone_is_refused() -> None:
    world = example_world("fp32")
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK)
    plan = BatchPlan.from_rows([((0, 1.0),)])
    fixed.fill(plan)
    world.tables.remove(0)
    with pytest.raises(KeyError, match="not installed"):
        fixed.fill(plan)


def test_every_site_of_a_fixed_plan_is_active() -> None:
    """Else a capture would leave out the sites that the first batch has no adapters at."""
    world = example_world("fp32")
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK)
    assert all(world.tables.active(site, fixed.plan) for site in range(len(SITES)))


def test_sites_that_were_not_captured_are_refused() -> None:
    world = example_world("fp32")
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK, sites=Touched(frozenset({0, 2})))
    assert not world.tables.active(1, fixed.plan)
    fixed.fill(BatchPlan.from_rows([((0, 1.0),)]))  # acts on the sites 0 and 2
    with pytest.raises(DoesNotFit, match="sites"):
        fixed.fill(BatchPlan.from_rows([((1, 1.0),)]))


def test_programs_that_lie_unaligned_make_captured_kernels_stale() -> None:
    """They read whole vectors: on a GPU such an address would fault."""
    world = World(torch.bfloat16, 0)
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK)
    world.tables.install(0, {0: Operands(1, 1.0, 8, 64)})
    fixed.fill(BatchPlan.from_rows([((0, 1.0),)]))
    world.tables.install(1, {0: Operands(1, 1.0, 3, 64)})
    assert fixed.is_stale
    with pytest.raises(DoesNotFit):
        fixed.fill(BatchPlan.from_rows([((0, 1.0),)]))


@pytest.mark.gpu
def test_cuda_graph_replays_do_what_the_buffer_says() -> None:
    from onebase.kernels.matmul_triton import TritonKernels

    world = example_world("bf16", "cuda")
    fixed = FixedPlan(world.tables, ROWS, max_tiles=TILES, max_rank=RANK, num_layers=2)
    body = TritonKernels(world.tables)
    x, ys = world.tensor(ROWS, SITES[0].in_features), [world.tensor(ROWS, SITES[site].out_features) for site in GROUP]

    def forward() -> None:
        body.expand_group(ys, body.shrink(x, GROUP, fixed.plan), GROUP, fixed.plan)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for runs in [*PLANS.values(), *reversed(PLANS.values())]:
        fixed.fill(BatchPlan.from_runs(runs))
        rows = [uses for length, uses in runs for _ in range(length)]
        rows += [()] * (ROWS - len(rows))
        wanted = [world.expected(ys[site], x, site, rows) for site in GROUP]
        graph.replay()
        for site in GROUP:
            want, size = wanted[site]
            assert bool(((ys[site].double() - want).abs() <= 6 * torch.finfo(world.dtype).eps * size).all()), runs
