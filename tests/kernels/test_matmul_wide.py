"""The Triton kernels at widths of many blocks, under forced configurations: K in parts, in steps, columns in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from onebase.kernels.config import Config, Configs, Shape
from onebase.kernels.fixed_plan import FixedPlan
from onebase.kernels.matmul_triton import TritonKernels
from onebase.kernels.plan import BatchPlan, Run, Uses
from onebase.kernels.tables import SiteShape
from onebase.kernels.tiles import FEW_ROWS, RANK_BLOCK
from onebase.kernels.touched import Touched

from .matmul_worlds import DTYPES, World, check, needs_interpreter

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTHS_IN, WIDTHS_OUT = (576, 1100, 2100, 4160), (1000, 333, 64)
EMBEDDING = SiteShape(19, 333)
SIZE = 1 << 23  # elements of an arena: room for all programs at the widest sites
LONGEST = (5, 17, 70)  # of a segment, for tiles of 16, 32 and 64 rows
USES: tuple[Uses, ...] = (((0, 1.0),), (), ((1, 0.5), (2, -1.5)), ((2, 1.0),), ((1, 2.0), (0, -0.5)))
RANKS, VECTORS, BIASES = (130, 16, 77, 3, None, 0, 1), ("pair in", "", "gain", ""), (True, False, True, False)
PROGRAMS = 3
CASES = [  # splits, h_in, dtype, stages of an expand, rows of the longest segment of a batch that has one
    (1, 1100, "fp32", 3, 70),
    (2, 576, "fp16", 1, 5),
    (4, 2100, "bf16", 3, 17),
    (8, 4160, "fp32", 1, 70),
    (16, 2100, "fp16", 3, 5),
]


class Forced(Configs):
    """Answers with what it was given, and never with the heuristic's."""

    def get(self, shape: Shape) -> Config:
        return self.tuned[shape]


@dataclass(frozen=True)
class Blocks:
    """What a shrink and the expands after it are forced to."""

    splits: int
    shrink_r: int
    shrink_k: int
    expand_r: int
    expand_n: int
    stages: int


def forced(world: World, plan: BatchPlan, blocks: Blocks) -> TritonKernels:
    plain = TritonKernels(world.tables, Configs())
    few = plain.shape("shrink", world.group, plan).block_m == FEW_ROWS
    shrink = Config(RANK_BLOCK if few else blocks.shrink_r, blocks.shrink_k, blocks.splits)
    expand = Config(blocks.expand_r, blocks.expand_n, num_stages=blocks.stages)
    tuned = {plain.shape("shrink", world.group, plan): shrink}
    tuned[plain.shape("token", (world.token_site,), plan)] = expand
    for sites in (world.group, *((site,) for site in world.group)):
        tuned[plain.shape("expand", sites, plan)] = expand
    return TritonKernels(world.tables, Forced(tuned))


# What comes first in a strategy is what a run of one example tries: it has to have all kinds in it.
LENGTHS = st.lists(st.sampled_from([1, 2, 4, 3]), min_size=len(USES), max_size=len(USES))


def drawn_world(data: st.DataObject, h_in: int, dtype: str, device: str = "cpu") -> World:
    slices = data.draw(st.permutations(WIDTHS_OUT), "slices")[:2]
    world = World(DTYPES[dtype], 7, device, SIZE, (*(SiteShape(h_in, width) for width in slices), EMBEDDING))
    kinds = [data.draw(st.permutations(values)) for values in (RANKS, BIASES, VECTORS)]
    for handle in range(PROGRAMS):
        world.add(handle, *([values[(3 * handle + site) % len(values)] for site in range(3)] for values in kinds))
    return world


def drawn_runs(data: st.DataObject, longest: int) -> list[Run]:
    """longest: rows of one run; the others have a few."""
    lengths, uses = data.draw(LENGTHS, "lengths"), data.draw(st.permutations(USES), "uses")
    if longest > FEW_ROWS:
        lengths[next(at for at, use in enumerate(uses) if use)] = longest
    return list(zip(lengths, uses, strict=True))


def drawn_blocks(data: st.DataObject, splits: int, stages: int) -> Blocks:
    ranks, others = st.sampled_from([32, 16, 64]), st.sampled_from([64, 128])
    return Blocks(splits, data.draw(ranks), data.draw(others), data.draw(ranks), data.draw(others), stages)


def rows_of(runs: Sequence[Run]) -> list[Uses]:
    return [uses for length, uses in runs for _ in range(length)]


def check_wide(
    data: st.DataObject,
    splits: int,
    h_in: int,
    dtype: str,
    stages: int,
    longest: int = FEW_ROWS,
    device: str = "cpu",
) -> None:
    world, runs = drawn_world(data, h_in, dtype, device), drawn_runs(data, longest)
    plan = BatchPlan.from_runs(runs)
    body = forced(world, plan, drawn_blocks(data, splits, stages))
    check(body, world, plan, rows_of(runs), together=data.draw(st.sampled_from([True, False]), "together"))


ONCE = settings(  # a failure is not made smaller: each attempt takes seconds
    max_examples=1, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
OFTEN = settings(ONCE, max_examples=25, derandomize=False)
ANY = {
    "splits": st.sampled_from([16, 8, 4, 2, 1]),
    "h_in": st.sampled_from(WIDTHS_IN),
    "dtype": st.sampled_from(["fp32", "bf16", "fp16"]),
    "stages": st.sampled_from([1, 3]),
    "longest": st.sampled_from([FEW_ROWS, *LONGEST]),
    "data": st.data(),
}


@needs_interpreter
@pytest.mark.parametrize("tall", [False, True], ids=["few", "tall"])
@pytest.mark.parametrize(("splits", "h_in", "dtype", "stages", "longest"), CASES)
@ONCE
@given(data=st.data())
def test_every_split_matches_the_formula(
    splits: int, h_in: int, dtype: str, stages: int, longest: int, tall: bool, data: st.DataObject
) -> None:
    check_wide(data, splits, h_in, dtype, stages, longest if tall else FEW_ROWS)


@needs_interpreter
@ONCE
@given(data=st.data())
def test_a_fixed_plan_matches_the_formula(data: st.DataObject) -> None:
    """What is filled in later is computed as the body chose for the plan at first."""
    world, rows = drawn_world(data, 1100, "fp32"), 12
    sites = Touched(frozenset(range(len(world.sites))), inputs=frozenset(world.group))
    fixed = FixedPlan(world.tables, rows, max_tiles=4, max_rank=130, sites=sites)
    body = forced(world, fixed.plan, drawn_blocks(data, 4, 3))
    for runs in ([(5, USES[0]), (1, ()), (2, USES[3])], [(1, ((1, 2.0),)), (3, USES[3])]):
        fixed.fill(BatchPlan.from_runs(runs))
        check(body, world, fixed.plan, rows_of([*runs, (rows - sum(length for length, _ in runs), ())]))


@needs_interpreter
@pytest.mark.slow
@OFTEN
@given(**ANY)
def test_any_batch_matches_the_formula(
    splits: int, h_in: int, dtype: str, stages: int, longest: int, data: st.DataObject
) -> None:
    check_wide(data, splits, h_in, dtype, stages, longest)


@pytest.mark.gpu
@OFTEN
@given(**ANY)
def test_cuda_matches_the_formula(
    splits: int, h_in: int, dtype: str, stages: int, longest: int, data: st.DataObject
) -> None:
    check_wide(data, splits, h_in, dtype, stages, longest, "cuda")
