"""Gated prefixes: the batched body and many programs at once equal the definition, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from onebase.kernels.ops.prefix import GatedPrefix

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _make(seed: int, length: int, dtype: torch.dtype, gates: int = 1) -> GatedPrefix:
    keys, values = (_draw(length, KV_HEADS, DIM, seed=seed + at, dtype=dtype) for at in (0, 100))
    return GatedPrefix(keys, values, _draw(gates, seed=seed + 200).float())


def _definition(op: GatedPrefix, q: Tensor) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        for head in range(HEADS):
            keys, values = (t[:, head // (HEADS // KV_HEADS)].double() for t in (op.keys, op.values))
            weights = [math.exp(SCALE * float(q[row, head].double() @ key)) for key in keys]
            mixed = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
            out[row, head] = mixed * float(op.gate[head % len(op.gate)])
    return out


@pytest.mark.parametrize("gates", [1, HEADS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_delta_equals_the_definition(dtype: torch.dtype, gates: int) -> None:
    op, q = _make(1, 5, dtype, gates), _draw(4, HEADS, DIM, seed=9, dtype=dtype)
    got = op.delta(q, SCALE)
    assert got.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), _definition(op, q), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1, 2), (4,)], ids=str)
@pytest.mark.parametrize("sizes", [(5, 5, 5), (5, 2, 1)], ids=str)
def test_many_programs_equal_each_alone(sizes: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    gates = (1, HEADS, 1)
    ops = [_make(at, size, torch.float64, gates[at]) for at, size in enumerate(sizes[: len(lengths)])]
    q = _draw(sum(lengths), HEADS, DIM, seed=7)
    expected = [_definition(op, part) for op, part in zip(ops, q.split(lengths), strict=True)]
    got = GatedPrefix.batched(ops, lengths, q, SCALE)
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-6, rtol=1e-6)
