"""Block-circulant matrices: a kernel for each pair of blocks, multiplied in Fourier space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, wide
from onebase.kernels.ops.stacking import piecewise, stacked


@dataclass(frozen=True, slots=True, eq=False)
class BlockCirculant(RowInstruction):
    """y += C x, and within the block (m, n): C[p, q] = kernel[m, n, (q - p) mod size]. Chen et al., "C3A" (2407.19342).

    spectrum: [frequencies, in_blocks, out_blocks, 2] float32, the kernels' conjugated transforms (size // 2 + 1 of
    them), real and imaginary parts. size: of a block.
    """

    kept: ClassVar[tuple[str, ...]] = ("spectrum",)
    phase: ClassVar[Phase] = Phase.ADD
    spectrum: Tensor
    size: int

    @classmethod
    def of(cls, kernel: Tensor) -> Self:
        """kernel: [out_blocks, in_blocks, size], any scale included."""
        spectrum = torch.fft.rfft(wide(kernel)).conj().resolve_conj().permute(2, 1, 0).contiguous()
        return cls(torch.view_as_real(spectrum), kernel.shape[2])

    @property
    def flops(self) -> int:
        return 4 * self.spectrum.numel()

    def delta(self, rows: Tensor) -> Tensor:
        blocks = max(self.spectrum.shape[1:3])
        return piecewise(rows, 2 * blocks * self.spectrum.shape[0], self._piece)

    def _piece(self, rows: Tensor) -> Tensor:
        return _back(torch.bmm(_forth(rows, self.size), torch.view_as_complex(self.spectrum)), self.size)

    def reference(self, rows: Tensor) -> Tensor:
        spectrum = torch.complex(self.spectrum[..., 0].double(), self.spectrum[..., 1].double())
        kernel = torch.fft.irfft(spectrum.conj().permute(2, 1, 0), n=self.size)
        p, q = torch.arange(self.size)[:, None], torch.arange(self.size)[None, :]
        blocks = kernel[:, :, (q - p) % self.size]  # [out_blocks, in_blocks, size, size]
        return torch.einsum("rnq,mnpq->rmp", rows.double().reshape(len(rows), -1, self.size), blocks).flatten(1)

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One transform there and one back for all single rows with kernels of one shape."""
        return stacked(ops, lengths, rows, lambda op: (op.size, *op.spectrum.shape), _one_row_each)


def _one_row_each(ops: Sequence[BlockCirculant], rows: Tensor) -> Tensor:
    """rows: [len(ops), width] -> [len(ops), out_features]."""
    spectra = torch.view_as_complex(torch.stack([op.spectrum for op in ops], dim=1))  # [frequencies, ops, in, out]
    mixed = torch.matmul(_forth(rows, ops[0].size).unsqueeze(2), spectra)
    return _back(mixed.squeeze(2), ops[0].size)


def _forth(rows: Tensor, size: int) -> Tensor:
    """[n, in_blocks * size] -> [frequencies, n, in_blocks]."""
    spectrum: Tensor = torch.fft.rfft(wide(rows).reshape(len(rows), -1, size))
    return spectrum.permute(2, 0, 1).contiguous()


def _back(spectrum: Tensor, size: int) -> Tensor:
    """[frequencies, n, out_blocks] -> [n, out_blocks * size]."""
    blocks: Tensor = torch.fft.irfft(spectrum.permute(1, 2, 0), n=size)
    return blocks.flatten(1)
