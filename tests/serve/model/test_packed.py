"""Packed linears equal their plain twins."""

from __future__ import annotations

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
    found = pack_linears([packed])
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
    pack_linears([head])
    assert torch.equal(table.weight, before)
    torch.testing.assert_close(head(torch.eye(8)), before.T)
