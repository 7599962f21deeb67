"""Bottlenecks at blocks: many segments at once equal each one's reference, whatever they read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from onebase.kernels.ops.bottleneck import ACTIVATIONS, BlockBottleneck

WIDTH = 24


def _op(seed: int, **options: Any) -> BlockBottleneck:
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*size, generator=generator) for size in ((4, WIDTH), (WIDTH, 4)))
    down_bias, up_bias = (torch.randn(size, generator=generator) for size in (4, WIDTH))
    fields = {"scale": torch.tensor([0.5]), "down_bias": down_bias, "up_bias": up_bias} | options
    return BlockBottleneck(down, up, **fields)


MIXED = [
    _op(1, reads="output", activation="gelu"),
    _op(2, reads="sum", activation="gelu"),
    _op(3, reads="residual", activation="tanh"),
    _op(4, reads="residual", activation="gelu", scale=torch.linspace(-1, 1, WIDTH)),
    _op(5, reads="sum", activation="tanh", up_bias=None),
]


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1), (3, 1, 2, 1, 1), (4,)], ids=str)
def test_segments_equal_their_references(lengths: tuple[int, ...]) -> None:
    ops = MIXED[: len(lengths)]
    outputs, residuals = ([torch.randn(length, WIDTH) for length in lengths] for _ in range(2))
    deltas = BlockBottleneck.deltas(ops, outputs, residuals)
    for op, output, residual, delta in zip(ops, outputs, residuals, deltas, strict=True):
        torch.testing.assert_close(delta.double(), op.reference(output, residual), atol=1e-5, rtol=1e-5)
    for one, other in itertools.pairwise(deltas):
        assert not torch.equal(one[:1], other[:1])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_pointwise_and_none_is_another(name: str) -> None:
    z = torch.linspace(-3, 3, 31)
    got = ACTIVATIONS[name](z)
    torch.testing.assert_close(torch.stack([ACTIVATIONS[name](value) for value in z]), got)
    for other in ACTIVATIONS.keys() - {name}:
        assert not torch.equal(ACTIVATIONS[other](z), got)
