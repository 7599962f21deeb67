"""Packed linears equal their plain twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from onebase.kernels.prepack import supported
from onebase.serve.model.packed import pack_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_equals_plain(dtype: torch.dtype, rows: int, bias: bool) -> None:
    if not supported(dtype):
        pytest.skip(f"this processor has no packed {dtype} operators")
    plain = nn.Linear(96, 72, bias=bias, dtype=dtype).requires_grad_(False)
    packed = nn.Linear(96, 72, bias=bias, dtype=dtype).requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    found = pack_linears([[packed]])
    assert torch.equal(found[packed].dense(), plain.weight)
    x = torch.randn(1, rows, 96, dtype=dtype)
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    ours, theirs = ((module(x).double() - exact).abs().max() for module in (packed, plain))
    assert packed(x).shape == plain(x).shape
    assert ours <= 2 * theirs + 1e-6


def test_a_tied_embedding_keeps_its_table() -> None:
    if not supported(torch.float32):
        pytest.skip("this processor has no packed operators")
    table, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = table.weight
    before = table.weight.detach().clone()
    pack_linears([[head]])
    assert torch.equal(table.weight, before)
    torch.testing.assert_close(head(torch.eye(8)), before.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [(True, False, True), (False, False, False)])
def test_modules_that_read_one_input_share_a_product(dtype: torch.dtype, biases: tuple[bool, ...]) -> None:
    if not supported(dtype):
        pytest.skip(f"this processor has no packed {dtype} operators")
    plain = [nn.Linear(48, width, bias, dtype=dtype) for width, bias in zip((96, 32, 40), biases, strict=True)]
    packed = copy.deepcopy(plain)
    found = pack_linears([packed])
    for one, other in zip(plain, packed, strict=True):
        assert torch.equal(found[other].dense(), one.weight)
    for rows in (1, 16, 5):
        x = torch.randn(1, rows, 48, dtype=dtype)
        for one, other in zip(plain, packed, strict=True):
            y = other(x)
            torch.testing.assert_close(y, one(x), rtol=2e-2, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)
            y.view(-1, y.shape[-1]).add_(1)  # as adapters do: the others' outputs are not touched


def test_a_shared_product_follows_its_input() -> None:
    """Other rows for one of them, as an adapter's rotation gives it; the same rows in new memory; a call left out."""
    if not supported(torch.float32):
        pytest.skip("this processor has no packed operators")
    plain = [nn.Linear(8, 4), nn.Linear(8, 6)]
    packed = copy.deepcopy(plain)
    pack_linears([packed])
    x = torch.randn(2, 8)
    for inputs in ((x, 2 * x), (x, x.view(1, 2, 8)), (x.clone(), x.clone()), (x, x)):
        for at, one, other in zip(inputs, plain, packed, strict=True):
            torch.testing.assert_close(other(at), one(at))
    packed[0](x)
    x.mul_(3)  # the second was never asked for what it was: a new forward begins
    torch.testing.assert_close(packed[0](x), plain[0](x))
    torch.testing.assert_close(packed[1](x), plain[1](x))
