"""Segments of unlike programs in one batch: groups of equal shapes run together, the rest alone, in the order given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onebase.kernels.ops.circulant import BlockCirculant
from onebase.kernels.ops.instruction import RowInstruction
from onebase.kernels.ops.rotate import BlockRotateIn, PairRotateOut, TokenRotate
from onebase.kernels.ops.sparse import Sparse, compress, one_row_each
from onebase.kernels.ops.spectral import FourierSparse, WaveletSparse

WIDTH, OUT = 24, 36


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _entries(count: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = torch.randint(0, height, (count,)), torch.randint(0, WIDTH, (count,))
    return compress(rows, columns, _draw(count), height)


# Each makes programs of three shapes by a number.
KINDS: dict[str, Callable[[int], RowInstruction]] = {
    "blocks": lambda at: BlockRotateIn(_draw(*((6, 4, 4), (1, 4, 4), (3, 8, 8))[at % 3]), WIDTH),
    "pairs": lambda at: PairRotateOut(_draw(WIDTH), _draw(WIDTH), (2, 8, 24)[at % 3]),
    "sparse": lambda at: Sparse(*_entries((0, 7, 90)[at % 3], OUT)),
    "fourier": lambda at: FourierSparse(*_entries((0, 7, 90)[at % 3], OUT // 2 + 1), OUT),
    "wavelet": lambda at: WaveletSparse(*_entries(90, OUT + 2), _draw(2, 4), OUT, WIDTH + 2),
    "circulant": lambda at: BlockCirculant.of(_draw(*((9, 6, 4), (3, 2, 12), (36, 24, 1))[at % 3])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3], ids=["unlike", "alike"])
@pytest.mark.parametrize("lengths", [(1,) * 7, (1, 4, 1, 1, 2, 1, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("piece", [1 << 23, 200, 1])
def test_unlike_programs_equal_each_alone(
    kind: str, step: int, lengths: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase.kernels.ops.stacking.PIECE", piece)
    torch.manual_seed(0)
    ops = [KINDS[kind](at * step) for at in range(len(lengths))]
    rows = _draw(sum(lengths), WIDTH)
    got = type(ops[0]).batched(ops, lengths, rows)
    parts = torch.split(rows, lengths)
    expected = torch.cat([op.reference(part) for op, part in zip(ops, parts, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_stacked_sparse_matrices_equal_each_alone() -> None:
    """What runs on a device."""
    torch.manual_seed(0)
    ops, rows = [Sparse(*_entries(90, OUT)) for _ in range(5)], _draw(5, WIDTH)
    expected = torch.cat([op.reference(row[None]) for op, row in zip(ops, rows, strict=True)])
    torch.testing.assert_close(one_row_each(ops, rows), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [1, 6])
def test_an_embedding_is_rotated(blocks: int, dtype: torch.dtype) -> None:
    op = TokenRotate(_draw(blocks, 4, 4).to(dtype), WIDTH)
    rows, tokens = _draw(5, WIDTH).to(dtype), torch.arange(-1, 4)
    got = op.apply(tokens, rows)
    assert got.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 0.05
    torch.testing.assert_close(got.double(), op.reference(tokens, rows), atol=tolerance, rtol=tolerance)
