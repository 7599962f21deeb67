"""What the ways of the CPU body cost on this machine: measured once per dtype, at start, in a fraction of a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels import bags, prepack
from onebase.kernels.low_rank_native import NativeRows
from onebase.kernels.plan import Segment
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

_WIDTH, _RANKS, _RANK, _ROWS = 768, 512, 32, 16  # a site's width; columns of a pack; of a program; rows of a step
_MATRICES = 8  # weights that take turns, so that they are as cold as in a step over many layers
_REPEATS = 3
_LEAST_WAIT = 16  # steps; members change about as often


@dataclass(frozen=True, slots=True)
class CpuTuning:
    """Estimates in microseconds; only their ratios matter. The defaults were measured on two Zen 5 cores in bf16.

    call: one product, whatever its size. mask: scaling and clearing xa. per_mac: a multiply-add with one program's
    factors; per_wide_mac: with a pack. per_byte: a weight byte that a product reads. gather: one gather. per_gathered:
    a multiply-add of a gather, weight read. prepack_after: steps that a pack has to stand before it is prepacked, which
    costs what as many steps save; None: it saves nothing.
    """

    call: float = 15.0
    mask: float = 12.0
    per_mac: float = 1 / 25e3
    per_wide_mac: float = 1 / 100e3
    per_byte: float = 1 / 16e3
    gather: float = 5.0
    per_gathered: float = 1 / 10e3
    prepack_after: int | None = 128


@cache
def measured(dtype: torch.dtype) -> CpuTuning:
    """The costs here, now. Another load on the machine moves them together, and the choice little."""
    with torch.inference_mode():
        return _plausible(_measure([torch.ones((_RANKS, _WIDTH), dtype=dtype) for _ in range(_MATRICES)]))


def _measure(wide: list[Tensor]) -> CpuTuning:
    narrow, weights = [matrix[:_RANK] for matrix in wide], wide[0].numel()
    row, rows, many = wide[0][:1], wide[0][:_ROWS], wide[0][: 4 * _ROWS]
    alone, alone_long = _product(row, narrow), _product(many, narrow)
    plain, first = _product(rows, wide), _product(row, wide)
    per_byte = max(0.0, first - alone) / (wide[0].nbytes - narrow[0].nbytes)
    gather, gathered = _gathers(wide, 1), _gathers(wide, _RANKS // _ROWS)
    return CpuTuning(
        call=alone - per_byte * narrow[0].nbytes,
        mask=_microseconds(_masking, wide),
        per_mac=(alone_long - alone) / (narrow[0].numel() * (len(many) - 1)),
        per_wide_mac=(plain - first) / (weights * (_ROWS - 1)),
        per_byte=per_byte,
        gather=gather,
        per_gathered=(gathered - gather) / (weights - weights // (_RANKS // _ROWS)),
        prepack_after=_prepack_after(rows, wide, plain),
    )


def _plausible(found: CpuTuning) -> CpuTuning:
    """What is farther than a factor of 8 from the defaults was measured while something else ran."""
    usual, fields = CpuTuning(), ("call", "mask", "per_mac", "per_wide_mac", "per_byte", "gather", "per_gathered")
    near = {name: min(max(getattr(found, name), getattr(usual, name) / 8), getattr(usual, name) * 8) for name in fields}
    return replace(found, **near)


def _product(rows: Tensor, matrices: list[Tensor]) -> float:
    return _microseconds(lambda matrix: linear(rows, matrix), matrices)


def _masking(matrix: Tensor) -> None:
    xa = matrix[:_ROWS, :_RANKS].clone()
    xa.mul_(xa).masked_fill_(xa > 1, 0)


def _gathers(matrices: list[Tensor], ranks: int) -> float:
    """Of one gather, where each of the rows has so many ranks: the mean of both kinds."""
    native = _native(matrices, ranks)
    if native is not None:
        return native / 2
    if not bags.supported():
        return math.inf
    index = torch.arange(_ROWS * ranks)
    owners, offsets, samples = index // ranks, index[::ranks], matrices[0].new_ones(_ROWS * ranks)
    rows = matrices[0][:_ROWS]
    shrink = _microseconds(lambda matrix: bags.dots(rows, matrix, index, owners), matrices)
    return (shrink + _microseconds(lambda matrix: bags.sums(samples, matrix, index, offsets), matrices)) / 2


def _native(matrices: list[Tensor], ranks: int) -> float | None:
    """Of both gathers in one call of C; None where there is no library."""
    tables = ProgramTables(torch.cat(matrices).flatten(), [SiteShape(_WIDTH, _WIDTH)] * len(matrices))
    body = NativeRows.of(tables)
    if body is None:
        return None
    block, half = matrices[0].numel(), len(matrices) // 2
    for handle in range(_ROWS):
        starts = [site * block + handle * ranks * _WIDTH for site in range(len(matrices))]
        operands = {site: Operands(ranks, 1.0, at, starts[site - half]) for site, at in enumerate(starts)}
        tables.install(handle, operands)
    pairs, x = body.pairs([Segment(row, 1, row) for row in range(_ROWS)]), matrices[0][:_ROWS]
    sites, y = iter(range(_REPEATS * len(matrices))), torch.zeros_like(x)
    return _microseconds(lambda _: body.add((y,), x, (next(sites) % len(matrices),), pairs), matrices)


def _prepack_after(rows: Tensor, matrices: list[Tensor], plain: float) -> int | None:
    if not prepack.supported(rows.dtype):
        return None
    packed: list[Tensor] = []
    cost = _microseconds(lambda matrix: packed.append(prepack.prepack(matrix, len(rows))), matrices)
    saved = plain - _microseconds(lambda matrix: prepack.product(rows, matrix), packed[: len(matrices)])
    return None if saved <= 0 else max(_LEAST_WAIT, round(cost / saved))


def _microseconds(call: Callable[[Tensor], object], matrices: list[Tensor]) -> float:
    """Of one call, the best of some rounds over all the matrices; without the time that others have the core."""
    best = math.inf
    for _ in range(_REPEATS):
        start = time.thread_time()
        for matrix in matrices:
            call(matrix)
        best = min(best, time.thread_time() - start)
    return 1e6 * best / len(matrices)
