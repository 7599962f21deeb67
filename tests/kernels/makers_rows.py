"""Random row instructions: (generator, in_features, out_features, dtype) -> one of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onebase.kernels.ops.bottleneck import InputBottleneck, OutputBottleneck, ParallelBottleneck
from onebase.kernels.ops.dense import Dense, OutputRows
from onebase.kernels.ops.instruction import RowInstruction
from onebase.kernels.ops.shared import SharedLowRank
from onebase.kernels.ops.vector import ScaleIn, ScaleOut

Maker = Callable[[Callable[..., Tensor], int, int], RowInstruction]
_A, _B = (torch.randn(5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) for size in (48, 64))


def _output_rows(draw: Callable[..., Tensor], width: int, out: int) -> OutputRows:
    index = torch.tensor([0, 3, out - 1], dtype=torch.int32)
    return OutputRows(index, draw(3, width), out)


def _shared(draw: Callable[..., Tensor], width: int, out: int) -> SharedLowRank:
    mid = draw(5)
    a, b = (matrix[:, :size].to(mid.dtype) for matrix, size in ((_A, width), (_B, out)))
    return SharedLowRank(a=a, b=b, mid=mid, out=draw(out))


# draw(*shape) gives a random tensor of the arena's dtype.
MAKERS: Mapping[type[RowInstruction], Maker] = {
    ScaleIn: lambda draw, width, out: ScaleIn(draw(width)),
    ScaleOut: lambda draw, width, out: ScaleOut(draw(out)),
    Dense: lambda draw, width, out: Dense(draw(out, width)),
    OutputRows: _output_rows,
    SharedLowRank: _shared,
    InputBottleneck: lambda draw, width, out: InputBottleneck(
        draw(4, width), draw(width, 4), draw(1), draw(4), draw(width), "gelu"
    ),
    OutputBottleneck: lambda draw, width, out: OutputBottleneck(
        draw(4, out), draw(out, 4), draw(out), None, draw(out), "tanh"
    ),
    ParallelBottleneck: lambda draw, width, out: ParallelBottleneck(
        draw(4, width), draw(out, 4), draw(1), draw(4), None, "relu"
    ),
}
