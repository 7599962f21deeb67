"""Every body of the low-rank kernels against the formula in float64, on arenas whose gaps are NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebase.kernels.base import LowRankKernels
from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_tuning import CpuTuning
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

SITES = (SiteShape(40, 24), SiteShape(40, 33), SiteShape(19, 16))  # two read one input; the last is an embedding
GROUP, TOKEN_SITE = (0, 1), 2
GAP = 3
PAIRS = 8  # a rotation's group: at the first site alone, whose width it divides
TUNINGS = {
    "cpu-solo": CpuTuning(call=0, mask=1e9, gather=1e9),
    "cpu-masked": CpuTuning(call=1e9, mask=0, gather=1e12),
    "cpu-prepacked": CpuTuning(call=1e9, mask=0, gather=1e12, prepack_after=1),
    "cpu-gathered": CpuTuning(call=1e9, gather=0),
    "cpu-native": CpuTuning(call=1e9, gather=0),
}
CPU_BODIES = ["reference", "cpu", *TUNINGS]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before the run (make test does)"
)


@dataclass(frozen=True)
class Op:
    """One program at one site, with its tensors kept beside the arena."""

    a: Tensor
    b: Tensor
    scale: float
    add_out: Tensor | None = None
    gain: Tensor | None = None
    sine: Tensor | None = None
    gain_in: Tensor | None = None

    def map(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the vectors add to an output, [out_features] float64, and a bound on its magnitude."""
        if self.gain is None:
            return torch.zeros_like(y), torch.zeros_like(y)
        delta, size = y * self.gain.double(), y.abs() * self.gain.double().abs()
        for n in range(len(y)) if self.sine is not None else ():
            is_first = n % PAIRS < PAIRS // 2
            partner = y[n + PAIRS // 2] if is_first else y[n - PAIRS // 2]
            turned = partner * self.sine[n].double()
            delta[n] += -turned if is_first else turned
            size[n] += turned.abs()
        return delta, size


class World:
    """An arena with NaN in all gaps, its tables, and the truth about each program."""

    def __init__(self, dtype: torch.dtype, seed: int, device: str = "cpu", size: int = 1 << 19) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.buffer = torch.full((size,), float("nan"), dtype=dtype, device=device)
        self.tables = ProgramTables(self.buffer, SITES)
        self.truth: dict[int, dict[int, Op]] = {}
        self.used = GAP

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.dtype).to(self.device)

    def add(
        self, handle: int, ranks: Sequence[int | None], bias: Sequence[bool], vectors: Sequence[str] = ("",) * 3
    ) -> None:
        """ranks: by site; None: the program does not touch it. vectors: some of gain, pair, in, by site."""
        ops: dict[int, Operands] = {}
        self.truth[handle] = {}
        for site, rank in enumerate(ranks):
            if rank is not None:
                ops[site] = self._operands(handle, site, rank, bias[site], vectors[site])
        self.tables.install(handle, ops)

    def _operands(self, handle: int, site: int, rank: int, biased: bool, vectors: str) -> Operands:
        shape, token = SITES[site], site == TOKEN_SITE
        a = self.tensor(shape.in_features, rank) if token else self.tensor(rank, shape.in_features)
        op = Op(a, self.tensor(rank, shape.out_features), 0.3 + handle % 3)
        if biased:
            op = replace(op, add_out=self.tensor(shape.out_features))
        if not token:
            op = replace(op, **self._vectors(site, vectors))
        self.truth[handle][site] = op
        where = [self._put(t) if t is not None else -1 for t in (op.a, op.b, op.add_out, op.gain, op.sine, op.gain_in)]
        group = PAIRS if op.sine is not None else 0
        return Operands(rank, op.scale, *where[:3], token, *where[3:5], group, where[5])

    def _vectors(self, site: int, kinds: str) -> dict[str, Tensor]:
        found, shape = {}, SITES[site]
        if "gain" in kinds or "pair" in kinds:
            found["gain"] = self.tensor(shape.out_features)
        if "pair" in kinds and site == 0:
            found["sine"] = self.tensor(shape.out_features)
        if "in" in kinds.split():
            found["gain_in"] = self.tensor(shape.in_features)
        return found

    def _put(self, tensor: Tensor) -> int:
        start = self.used
        self.buffer[start : start + tensor.numel()] = tensor.flatten()
        self.used = start + tensor.numel() + GAP
        return start

    def expected(self, y: Tensor, x: Tensor, site: int, rows: Sequence[tuple[tuple[int, float], ...]]) -> list[Tensor]:
        """The result and a bound on its magnitude, both float64. x: rows of the input, or token ids."""
        out, size = y.double().clone(), y.double().abs()
        for row, uses in enumerate(rows):
            for handle, weight in uses:
                op = self.truth[handle].get(site)
                if op is None:
                    continue
                a, b = op.a.double(), op.b.double()
                xa = a[x[row]] if site == TOKEN_SITE else a @ x[row].double()
                xa_size = xa.abs() if site == TOKEN_SITE else a.abs() @ x[row].double().abs()
                bias = torch.zeros_like(out[row]) if op.add_out is None else op.add_out.double()
                mapped, mapped_size = op.map(y[row].double())
                out[row] += weight * (op.scale * xa @ b + bias + mapped)
                size[row] += abs(weight) * (op.scale * xa_size @ b.abs() + bias.abs() + mapped_size)
        return [out, size]

    def expected_input(self, x: Tensor, site: int, rows: Sequence[tuple[tuple[int, float], ...]]) -> list[Tensor]:
        """As ``expected``: x behind the programs' gains."""
        out, size = x.double().clone(), x.double().abs()
        for row, uses in enumerate(rows):
            for handle, weight in uses:
                op = self.truth[handle].get(site)
                if op is not None and op.gain_in is not None:
                    out[row] += weight * op.gain_in.double() * x[row].double()
                    size[row] += (weight * op.gain_in.double() * x[row].double()).abs()
        return [out, size]


def make_body(name: str, tables: ProgramTables) -> LowRankKernels:
    if name in TUNINGS:
        return CpuKernels(tables, TUNINGS[name], compiled=name == "cpu-native")
    return select_kernels(tables, name)  # type: ignore[arg-type]


def check(
    body: LowRankKernels,
    world: World,
    plan: BatchPlan,
    rows: Sequence[tuple[tuple[int, float], ...]],
    *,
    together: bool = False,
    origins: bool = False,
) -> None:
    """All three sites of one batch; y is a strided slice of a larger tensor whose other columns must not change.
    origins: something has been added to y, and maps read what it was."""
    before = world.buffer.clone()
    n = len(rows)
    x = world.tensor(n, 2 * SITES[0].in_features)[:, : SITES[0].in_features]
    tokens = torch.randint(SITES[TOKEN_SITE].in_features, (n,), generator=world.random).to(world.device)
    shrunk = body.shrink(x, GROUP, plan)
    wholes = [world.tensor(n, shape.out_features + 7) for shape in SITES]
    kepts = [whole.clone() for whole in wholes]
    ys = [whole[:, 4 : 4 + shape.out_features] for whole, shape in zip(wholes, SITES, strict=True)]
    wanted = [world.expected(y, tokens if site == TOKEN_SITE else x, site, rows) for site, y in enumerate(ys)]
    for site in GROUP:
        check_input(body, world, x, site, plan, rows)
    if origins:
        befores = {site: ys[site].clone() for site in GROUP}
        for site in GROUP:
            ys[site].mul_(2)
            kepts[site].copy_(wholes[site])
            wanted[site][0] += befores[site].double()
            wanted[site][1] += befores[site].double().abs()
        body.expand_group([ys[site] for site in GROUP], shrunk, GROUP, plan, befores)
    elif together:
        body.expand_group([ys[site] for site in GROUP], shrunk, GROUP, plan)
    else:
        for site in reversed(GROUP):
            body.expand(ys[site], shrunk, site, plan)
    body.token_low_rank(ys[TOKEN_SITE], tokens, TOKEN_SITE, plan)
    for site, shape in enumerate(SITES):
        whole, kept, y, (want, size) = wholes[site], kepts[site], ys[site], wanted[site]
        error = (y.double() - want).abs()
        assert bool((error <= _bound(world.dtype, size)).all()), (site, error.max())
        bare = [row for row, uses in enumerate(rows) if not any(site in world.truth[h] for h, _ in uses)]
        assert torch.equal(y[bare], kept[bare, 4 : 4 + shape.out_features])
        assert torch.equal(whole[:, :4], kept[:, :4])
        assert torch.equal(whole[:, 4 + shape.out_features :], kept[:, 4 + shape.out_features :])
    assert torch.equal(before.nan_to_num(7777.0), world.buffer.nan_to_num(7777.0))


def _bound(dtype: torch.dtype, size: Tensor) -> Tensor:
    """Six roundings of the terms' sizes; near zero a rounding is of the type's smallest step."""
    info = torch.finfo(dtype)
    return 6 * info.eps * size.clamp(min=info.smallest_normal)


def check_input(
    body: LowRankKernels, world: World, x: Tensor, site: int, plan: BatchPlan, rows: Sequence[tuple]
) -> None:
    """Scaled inputs, into a strided slice."""
    whole = world.tensor(len(rows), x.shape[1] + 5)
    target = whole[:, 3 : 3 + x.shape[1]]
    target.copy_(x)
    kept, (want, size) = whole.clone(), world.expected_input(x, site, rows)
    body.scale_in(target, x, site, plan)
    assert bool(((target.double() - want).abs() <= _bound(world.dtype, size)).all()), site
    bare = [
        row
        for row, uses in enumerate(rows)
        if not any(site in world.truth[h] and world.truth[h][site].gain_in is not None for h, _ in uses)
    ]
    assert torch.equal(whole[bare], kept[bare])
    assert torch.equal(whole[:, :3], kept[:, :3])
    assert torch.equal(whole[:, -2:], kept[:, -2:])


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


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN: what is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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
