"""Random rotations, sparse, spectral and circulant instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from onebase.kernels.ops.circulant import BlockCirculant
from onebase.kernels.ops.instruction import RowInstruction
from onebase.kernels.ops.rotate import BlockRotateIn, ButterflyIn, PairRotateOut
from onebase.kernels.ops.sparse import Sparse, compress
from onebase.kernels.ops.spectral import FourierSparse, WaveletSparse

Draw = Callable[..., Tensor]
Maker = Callable[[Draw, int, int], RowInstruction]
ENTRIES = 200


def _entries(draw: Draw, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places that repeat, and whole rows and columns without an entry."""
    values = draw(ENTRIES)
    places = (draw(2, ENTRIES).double().abs() * 1e4).long()
    return compress(places[0] % (height - 1), places[1] % (width - 1) + 1, values, height)


def _sparse(draw: Draw, width: int, out: int) -> Sparse:
    return Sparse(*_entries(draw, out, width))


def _fourier(draw: Draw, width: int, out: int) -> FourierSparse:
    return FourierSparse(*_entries(draw, out // 2 + 1, width), out)


def _wavelet(draw: Draw, width: int, out: int) -> WaveletSparse:
    """Filters of length 6 that are no wavelet: the transform is linear in any. The ends are cut off."""
    starts, columns, values = _entries(draw, out + 6, width + 6)
    return WaveletSparse(starts, columns, values, draw(2, 6), out, width + 6)


# draw(*shape) gives a random tensor of the arena's dtype.
MAKERS: Mapping[type[RowInstruction], Maker] = {
    BlockRotateIn: lambda draw, width, out: BlockRotateIn(draw(width // 8, 8, 8), width),
    ButterflyIn: lambda draw, width, out: ButterflyIn(draw(3, width // 6, 6, 6)),
    PairRotateOut: lambda draw, width, out: PairRotateOut(draw(out), draw(out), 8),
    Sparse: _sparse,
    FourierSparse: _fourier,
    WaveletSparse: _wavelet,
    BlockCirculant: lambda draw, width, out: BlockCirculant.of(draw(out // 8, width // 8, 8)),
}
