"""Row-wise vectors: scale the input or the output of a linear site. Frequent (IA3, DoRA), so batched over segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, repeated, wide


@dataclass(frozen=True, slots=True, eq=False)
class Scale(RowInstruction):
    """Multiply by ``1 + gain``. gain: [width]; stored less one, since factors near one would lose bits in bfloat16."""

    gain: Tensor

    def delta(self, rows: Tensor) -> Tensor:
        return wide(rows) * self.gain

    def reference(self, rows: Tensor) -> Tensor:
        return rows.double() @ torch.diag(self.gain.double())

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One multiplication for all segments; each row reads its program's vector."""
        if len(ops) == 1:
            return ops[0].delta(rows)
        return wide(rows) * repeated([op.gain for op in ops], lengths)


@dataclass(frozen=True, slots=True, eq=False)
class ScaleIn(Scale):
    """x * (1 + gain) into the base. gain: [in_features]. IA3's feedforward modules."""

    phase: ClassVar[Phase] = Phase.INPUT


@dataclass(frozen=True, slots=True, eq=False)
class ScaleOut(Scale):
    """(W x + b) * (1 + gain). gain: [out_features]. IA3, DoRA, BOFT.

    A family that scales before the bias adds ``-gain * b`` by ``SiteOps.add_out``.
    """

    phase: ClassVar[Phase] = Phase.MAP
