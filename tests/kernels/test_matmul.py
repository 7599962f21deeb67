"""Every body of the low-rank kernels against the formula in float64, on arenas whose gaps are NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase.kernels.base import LowRankKernels
from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables

from .matmul_worlds import DTYPES, GROUP, TOKEN_SITE, World, check, needs_interpreter

pytestmark = pytest.mark.usefixtures("poisoned")

TUNINGS = {
    "cpu-solo": CpuTuning(call=0, mask=1e9, gather=1e9),
    "cpu-masked": CpuTuning(call=1e9, mask=0, gather=1e12),
    "cpu-prepacked": CpuTuning(call=1e9, mask=0, gather=1e12, prepack_after=1),
    "cpu-gathered": CpuTuning(call=1e9, gather=0),
    "cpu-native": CpuTuning(call=1e9, gather=0),
}
CPU_BODIES = ["reference", "cpu", *TUNINGS]


def make_body(name: str, tables: ProgramTables) -> LowRankKernels:
    if name in TUNINGS:
        return CpuKernels(tables, TUNINGS[name], compiled=name == "cpu-native")
    return select_kernels(tables, name)  # type: ignore[arg-type]


RANKS = st.sampled_from([0, 1, 3, 16, 77, 256, 512])
PROGRAM = st.tuples(
    st.lists(st.one_of(st.none(), RANKS), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.lists(st.sampled_from(["", "", "gain", "pair", "in", "pair in"]), min_size=3, max_size=3),
)
ROW_USES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([1.0, 0.5, -1.5])), max_size=2, unique_by=lambda u: u[0]
)
RUNS = st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 5, 17, 70]), ROW_USES.map(tuple)), max_size=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CPU_BODIES)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs=st.lists(PROGRAM, min_size=4, max_size=4), runs=RUNS, seed=st.integers(0, 99))
def test_bodies_match_the_formula(name: str, dtype: str, programs: list, runs: list, seed: int) -> None:
    check_drawn(name, dtype, programs, runs, seed)


def check_drawn(name: str, dtype: str, programs: list, runs: list, seed: int, device: str = "cpu") -> None:
    world = World(DTYPES[dtype], seed, device)
    for handle, program in enumerate(programs):
        world.add(handle, *program)
    rows = [uses for length, uses in runs for _ in range(length)]
    body, plan = make_body(name, world.tables), BatchPlan.from_runs(runs)
    for _ in range(1 + 3 * (name == "cpu-prepacked")):  # the last finds every pack prepacked
        check(body, world, plan, rows, together=bool(seed % 4), origins=seed % 3 == 0)


@needs_interpreter
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    programs=st.lists(PROGRAM, min_size=4, max_size=4),
    runs=RUNS,
    seed=st.integers(0, 99),
)
def test_triton_interpreted_matches_the_formula(dtype: str, programs: list, runs: list, seed: int) -> None:
    check_drawn("triton", dtype, programs, runs, seed)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    programs=st.lists(PROGRAM, min_size=4, max_size=4),
    runs=RUNS,
    seed=st.integers(0, 99),
)
def test_cuda_matches_the_formula(dtype: str, programs: list, runs: list, seed: int) -> None:
    check_drawn("triton", dtype, programs, runs, seed, "cuda")


EXAMPLES = {
    "empty": [],
    "base only": [(3, ())],
    "one row each": [(1, ((h, 1.0),)) for h in range(4)],
    "one giant": [(1, ()), (75, ((3, 0.5),))],
    "decode beside prefill": [(1, ((0, 1.0),)), (2, ()), (70, ((1, 1.0),)), (1, ((3, 2.0),))],
    "a row in two segments": [(1, ((0, 1.0), (1, -0.5))), (2, ((1, -0.5), (3, 1.0))), (1, ((3, 1.0),))],
}


def example_world(dtype: str, device: str = "cpu") -> World:
    world = World(DTYPES[dtype], 5, device)
    world.add(0, [1, None, 3], [False, True, False])
    world.add(1, [77, 16, 0], [True, False, True])
    world.add(2, [None, None, None], [False] * 3)
    world.add(3, [16, 0, 33], [False, True, True])
    return world


def vector_world(dtype: str, device: str = "cpu") -> World:
    """Handles as of example_world: vectors alone, beside low rank, none; and a rotation beside both."""
    world = World(DTYPES[dtype], 6, device)
    world.add(0, [0, 0, None], [False, True, False], ["pair", "gain", ""])
    world.add(1, [77, None, 0], [True, False, True], ["gain in", "", ""])
    world.add(2, [None, None, None], [False] * 3)
    world.add(3, [16, 0, 33], [False, False, True], ["pair in", "in", ""])
    return world


def run_example(name: str, dtype: str, layout: str, device: str = "cpu") -> None:
    runs = EXAMPLES[layout]
    rows = [uses for length, uses in runs for _ in range(length)]
    for make in (example_world, vector_world):
        for together, origins in ((False, False), (True, False), (True, True)):
            world = make(dtype, device)
            body, plan = make_body(name, world.tables), BatchPlan.from_runs(runs)
            check(body, world, plan, rows, together=together, origins=origins)


@pytest.mark.parametrize("layout", EXAMPLES)
@pytest.mark.parametrize("name", CPU_BODIES)
def test_layouts(name: str, layout: str) -> None:
    run_example(name, "fp32", layout)


@needs_interpreter
@pytest.mark.parametrize("layout", EXAMPLES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_triton_interpreted(dtype: str, layout: str) -> None:
    run_example("triton", dtype, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", EXAMPLES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_cuda(name: str, dtype: str, layout: str) -> None:
    run_example(name, dtype, layout, "cuda")


@pytest.mark.parametrize("name", CPU_BODIES)
def test_shrunk_of_another_body_is_refused(name: str) -> None:
    world = example_world("fp32")
    other = "cpu" if name == "reference" else "reference"
    plan = BatchPlan.from_rows([((0, 1.0),)])
    shrunk = make_body(other, world.tables).shrink(torch.zeros(1, 40), GROUP, plan)
    with pytest.raises(TypeError, match="shrunk"):
        make_body(name, world.tables).expand(torch.zeros(1, 24), shrunk, 0, plan)


@pytest.mark.parametrize("name", CPU_BODIES)
def test_a_removed_program_is_refused(name: str) -> None:
    world = example_world("fp32")
    body, plan = make_body(name, world.tables), BatchPlan.from_rows([((0, 1.0),), ((1, 1.0),)])
    body.shrink(torch.zeros(2, 40), GROUP, plan)
    body.forget(0)
    world.tables.remove(0)
    with pytest.raises(KeyError, match="not installed"):
        body.shrink(torch.zeros(2, 40), GROUP, plan)


def test_bf16_is_at_most_twice_as_far_as_the_plain_bf16_path() -> None:
    """The yardstick: PEFT's y + (x @ A.T @ B) * scale with every intermediate in bf16."""
    world = example_world("bf16")
    rows = [((1, 1.0),), ((3, 1.0),), ((0, 1.0),)] * 4
    x, y = world.tensor(12, 40), world.tensor(12, 24)
    want, _ = world.expected(y, x, 0, rows)
    peft = y.clone()
    for row, ((handle, _),) in enumerate(rows):
        op = world.truth[handle][0]
        peft[row] += (x[row] @ op.a.T @ op.b) * op.scale
        if op.add_out is not None:
            peft[row] += op.add_out
    yardstick = (peft.double() - want).square().mean().sqrt()
    for name in CPU_BODIES:
        body, plan, mine = make_body(name, world.tables), BatchPlan.from_rows(rows), y.clone()
        body.expand(mine, body.shrink(x, (0,), plan), 0, plan)
        assert (mine.double() - want).square().mean().sqrt() <= 2 * yardstick


@pytest.mark.parametrize("name", CPU_BODIES)
def test_an_embedding_is_not_read_as_a_linear_site(name: str) -> None:
    world = example_world("fp32")
    body, plan = make_body(name, world.tables), BatchPlan.from_rows([((0, 1.0),), ((3, 1.0),)])
    with pytest.raises(ValueError, match="token operands are read by token_low_rank"):
        body.shrink(torch.zeros(2, 19), (TOKEN_SITE,), plan)


# Of x, A and B, and the scale. xa is beyond fp16's 65504, scaled or not, or among its smallest numbers.
SIZES = {"large": (1e4, 2, 0.1, 1e-5), "large when scaled": (1e4, 2, 1e-3, 1.0), "small": (1e-3, 0.01, 1, 1e5)}


def check_sizes(x_size: float, a_size: float, b_size: float, scale: float, rows: int, device: str = "cpu") -> None:
    """The first row is much smaller than those beside it, and as exact."""
    world = World(torch.float16, 0, device)
    a, b = a_size * world.tensor(16, 40), b_size * world.tensor(16, 24)
    world.tables.install(0, {0: Operands(16, scale, world._put(a), world._put(b))})
    x, plan = x_size * world.tensor(rows, 40), BatchPlan.from_runs([(rows, ((0, 1.0),))])
    x[:1] /= 1000
    want, got = x.new_zeros(rows, 24), x.new_zeros(rows, 24)
    for name, y in (("reference", want), ("triton", got)):
        body = make_body(name, world.tables)
        body.expand(y, body.shrink(x, (0,), plan), 0, plan)
    assert bool(want.isfinite().all())
    assert bool(((got - want).double().abs() <= 2e-3 * want.double().abs().amax(1, keepdim=True)).all())


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_fp16_holds_xa_of_any_size(sizes: str, rows: int) -> None:
    check_sizes(*SIZES[sizes], rows)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_cuda_fp16_holds_xa_of_any_size(sizes: str, rows: int) -> None:
    check_sizes(*SIZES[sizes], rows, "cuda")
