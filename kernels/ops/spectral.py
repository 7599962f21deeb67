"""Few coefficients of a matrix's Fourier or wavelet transform: rows go to the spectrum, through it, and back.

The dense matrix is never formed. Transforms run in float32 whatever the rows are in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from onebase.kernels.ops.instruction import Phase, wide
from onebase.kernels.ops.sparse import SparseMatrix
from onebase.kernels.ops.stacking import fits, piecewise


@dataclass(frozen=True, slots=True, eq=False)
class FourierSparse(SparseMatrix):
    """y += D x with D[p, q] = sum of values[k] cos(2 pi (r[k] p / out_features + s[k] q / in_features)).

    Gao et al., "FourierFT" (2405.03003). The matrix holds value k at row r[k] and column s[k]; since the cosine is
    even, r stays within [0, out_features / 2]: its height is out_features // 2 + 1. values: float32.
    """

    kept: ClassVar[tuple[str, ...]] = ("values",)
    phase: ClassVar[Phase] = Phase.ADD
    out_features: int

    def delta(self, rows: Tensor) -> Tensor:
        width = 2 * max(rows.shape[1], self.out_features)
        return piecewise(rows, width, lambda part: _transformed([self], [len(part)], part))

    def reference(self, rows: Tensor) -> Tensor:
        width = rows.shape[1]
        matrix = torch.zeros(self.out_features, width, dtype=torch.float64, device=rows.device)
        p = torch.arange(self.out_features, dtype=torch.float64, device=rows.device)[:, None] / self.out_features
        q = torch.arange(width, dtype=torch.float64, device=rows.device)[None, :] / width
        spectrum = self.dense(width)
        for r, s in spectrum.nonzero().tolist():
            matrix += spectrum[r, s] * torch.cos(2 * math.pi * (r * p + s * q))
        return rows.double() @ matrix.T

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One transform there and one back for all segments, where they are few rows."""
        if fits(rows, 2 * max(rows.shape[1], ops[0].out_features)):
            return _transformed(ops, lengths, rows)
        parts = torch.split(rows, list(lengths))
        return torch.cat([op.delta(part) for op, part in zip(ops, parts, strict=True)])


def _transformed(ops: Sequence[FourierSparse], lengths: Sequence[int], rows: Tensor) -> Tensor:
    spectrum = torch.fft.fft(wide(rows)).conj().resolve_conj()
    parts = torch.split(torch.view_as_real(spectrum), list(lengths))
    mixed = torch.cat([_through(op, part) for op, part in zip(ops, parts, strict=True)])
    mixed[:, 1 : (ops[0].out_features + 1) // 2] *= 0.5  # irfft counts these twice
    out: Tensor = torch.fft.irfft(torch.view_as_complex(mixed), n=ops[0].out_features, norm="forward")
    return out


def _through(op: FourierSparse, spectrum: Tensor) -> Tensor:
    """spectrum: [n, width, 2] -> [n, height, 2]: real and imaginary parts go through the real matrix."""
    columns = spectrum.permute(1, 0, 2).reshape(spectrum.shape[1], -1)
    return op.product(columns).reshape(op.height, -1, 2).permute(1, 0, 2).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class WaveletSparse(SparseMatrix):
    """y += D x with D = R S R^T cut to its size, R the one-level inverse wavelet transform. Bilican et al., "WaveFT"
    (2505.12532).

    The matrix S is over (low, high) bands on both sides, a half each; values: float32.
    filters: [2, length], float32: the reconstruction filters, low and high; the length is even.
    """

    kept: ClassVar[tuple[str, ...]] = ("values", "filters")
    phase: ClassVar[Phase] = Phase.ADD
    filters: Tensor
    out_features: int
    width: int

    @property
    def flops(self) -> int:
        return 2 * self.values.numel() + 2 * self.filters.shape[1] * (self.width + self.height)

    def delta(self, rows: Tensor) -> Tensor:
        return piecewise(rows, max(self.width, self.height), self._piece)

    def _piece(self, rows: Tensor) -> Tensor:
        bands = analyse(wide(rows), self.filters, self.width)
        return synthesise(self.product(bands.T).T, self.filters)[:, : self.out_features]

    def reference(self, rows: Tensor) -> Tensor:
        before = _synthesis(self.filters, self.width)[: rows.shape[1]]
        after = _synthesis(self.filters, self.height)[: self.out_features]
        return rows.double() @ (after @ self.dense(self.width) @ before.T).T


def analyse(rows: Tensor, filters: Tensor, width: int) -> Tensor:
    """R^T x for each row: [n, features] -> [n, width], the low band first."""
    length = filters.shape[1]
    windows = pad(rows, (length - 2, width - rows.shape[1])).unfold(1, length, 2)  # [n, width / 2, length]
    return (windows @ filters.to(rows.dtype).T).transpose(1, 2).reshape(len(rows), width)


def synthesise(bands: Tensor, filters: Tensor) -> Tensor:
    """R z for each row: [n, height], the low band first -> [n, height + 2 - length]."""
    taps = filters.shape[1] // 2
    phases = filters.to(bands.dtype).view(2, taps, 2).flip(1)  # [band, tap, even or odd output]
    windows = bands.reshape(len(bands), 2, -1).unfold(2, taps, 1)  # [n, band, outputs / 2, tap]
    return torch.einsum("nbmt,btp->nmp", windows, phases).reshape(len(bands), -1)


def _synthesis(filters: Tensor, bands: int) -> Tensor:
    """R as a matrix [bands + 2 - length, bands], by its definition, in float64."""
    length = filters.shape[1]
    matrix = torch.zeros(bands + 2 - length, bands, dtype=torch.float64, device=filters.device)
    for at in range(bands):
        band, shift = divmod(at, bands // 2)
        for tap in range(length):
            row = 2 * shift + tap - (length - 2)
            if 0 <= row < len(matrix):
                matrix[row, at] += filters[band, tap].double()
    return matrix
