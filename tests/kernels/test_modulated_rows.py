"""Rows multiplied by rows of low rank: the batched body equals its definition, and virtual tokens keep their rows."""

from __future__ import annotations

import pytest
import torch

from onebase.kernels.ops.modulated import ModulatedRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_equals_its_definition(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, rows = (torch.randn(*size, generator=draw).to(dtype) for size in ((9, 3), (3, 16), (6, 16)))
    op = ModulatedRows(a, b, 0.5)
    tokens = torch.tensor([4, -1, 0, 8, -2, 4])
    before = rows.clone()
    got = op.apply(tokens, rows)
    assert got.dtype == dtype
    assert torch.equal(rows, before)
    torch.testing.assert_close(got, op.reference(tokens, rows))
    assert torch.equal(got[[1, 4]], rows[[1, 4]])
    expected = rows[0].double() * (1 + 0.5 * (a[4].double() @ b.double()))
    torch.testing.assert_close(got[0].double(), expected, atol=0.05 if dtype is torch.bfloat16 else 1e-5, rtol=0)
    assert op.rank == 3
    assert op.flops == 2 * 3 * 16 + 2 * 16
