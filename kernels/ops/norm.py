"""A norm with other parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onebase.kernels.ops.instruction import Instruction


@dataclass(frozen=True, slots=True, eq=False)
class NormOverride(Instruction):
    """The rows of a norm computed with these parameters in place of the base's. LN_TUNING, BitFit, saved norms.

    weight: [width], as the module stores it (Gemma's counts from zero); bias: [width], None where the norm has none.
    The site runs the base module's own forward over them, so every kind of norm is exact.
    """

    weight: Tensor
    bias: Tensor | None = None
