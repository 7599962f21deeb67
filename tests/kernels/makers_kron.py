"""Random Kronecker products: 48 = 6 * 8 in, 64 = 4 * 16 out, with a whole or a factored right side by the seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from onebase.kernels.ops.instruction import RowInstruction
from onebase.kernels.ops.kron import Kron

Maker = Callable[[Callable[..., Tensor], int, int], RowInstruction]


def _kron(draw: Callable[..., Tensor], width: int, out: int) -> Kron:
    if float(draw(1)) > 0:
        return Kron(draw(4, 6), draw(out // 4, 3), draw(3, width // 6))
    return Kron(draw(4, 6), draw(out // 4, width // 6))


MAKERS: Mapping[type[RowInstruction], Maker] = {Kron: _kron}
