"""Arenas with NaN in their gaps, the truth about the programs in them, and the check of a kernel body against it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from onebase.kernels.base import LowRankKernels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

SITES = (SiteShape(40, 24), SiteShape(40, 33), SiteShape(19, 16))  # all but the last read one input: an embedding
GROUP, TOKEN_SITE = (0, 1), 2
GAP = 3
PAIRS = 8  # a rotation's group: at linear sites whose width it divides
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
        if self.sine is not None:
            first, second = y.view(-1, 2, PAIRS // 2).unbind(1)
            turned = torch.stack((-second, first), 1).flatten() * self.sine.double()
            delta, size = delta + turned, size + turned.abs()
        return delta, size


class World:
    """An arena with NaN in all gaps, its tables, and the truth about each program."""

    def __init__(
        self,
        dtype: torch.dtype,
        seed: int,
        device: str = "cpu",
        size: int = 1 << 19,
        sites: tuple[SiteShape, ...] = SITES,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.buffer = torch.full((size,), float("nan"), dtype=dtype, device=device)
        self.sites, self.token_site = sites, len(sites) - 1
        self.group = tuple(range(self.token_site))
        self.tables = ProgramTables(self.buffer, sites)
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
        shape, token = self.sites[site], site == self.token_site
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
        found, shape = {}, self.sites[site]
        if "gain" in kinds or "pair" in kinds:
            found["gain"] = self.tensor(shape.out_features)
        if "pair" in kinds and shape.out_features % PAIRS == 0:
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
        """The result and a bound on its magnitude, both float64. x: rows of the input, or token ids. Sums of xa are
        rounded in fp32 at least: a narrower type's bound has no more of their terms' sizes than that."""
        out, size = y.double().clone(), y.double().abs()
        fp32 = min(1.0, torch.finfo(torch.float32).eps / torch.finfo(self.dtype).eps)
        for row, uses in enumerate(rows):
            for handle, weight in uses:
                op = self.truth[handle].get(site)
                if op is None:
                    continue
                a, b = op.a.double(), op.b.double()
                xa = a[x[row]] if site == self.token_site else a @ x[row].double()
                xa_size = xa.abs() if site == self.token_site else xa.abs() + fp32 * (a.abs() @ x[row].double().abs())
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


def check(
    body: LowRankKernels,
    world: World,
    plan: BatchPlan,
    rows: Sequence[tuple[tuple[int, float], ...]],
    *,
    together: bool = False,
    origins: bool = False,
) -> None:
    """All sites of one batch; y is a strided slice of a larger tensor whose other columns must not change.
    origins: something has been added to y, and maps read what it was."""
    before = world.buffer.clone()
    n, sites, group, token_site = len(rows), world.sites, world.group, world.token_site
    x = world.tensor(n, 2 * sites[0].in_features)[:, : sites[0].in_features]
    tokens = torch.randint(sites[token_site].in_features, (n,), generator=world.random).to(world.device)
    shrunk = body.shrink(x, group, plan)
    wholes = [world.tensor(n, shape.out_features + 7) for shape in sites]
    kepts = [whole.clone() for whole in wholes]
    ys = [whole[:, 4 : 4 + shape.out_features] for whole, shape in zip(wholes, sites, strict=True)]
    wanted = [world.expected(y, tokens if site == token_site else x, site, rows) for site, y in enumerate(ys)]
    for site in group:
        check_input(body, world, x, site, plan, rows)
    if origins:
        befores = {site: ys[site].clone() for site in group}
        for site in group:
            ys[site].mul_(2)
            kepts[site].copy_(wholes[site])
            wanted[site][0] += befores[site].double()
            wanted[site][1] += befores[site].double().abs()
        body.expand_group([ys[site] for site in group], shrunk, group, plan, befores)
    elif together:
        body.expand_group([ys[site] for site in group], shrunk, group, plan)
    else:
        for site in reversed(group):
            body.expand(ys[site], shrunk, site, plan)
    body.token_low_rank(ys[token_site], tokens, token_site, plan)
    for site, shape in enumerate(sites):
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
