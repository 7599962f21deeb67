"""Random interventions: see makers_rows.py."""

from __future__ import annotations

from collections.abc import Mapping

from onebase.kernels.ops.instruction import RowInstruction
from onebase.kernels.ops.reft import Intervention

from .makers_rows import Maker

MAKERS: Mapping[type[RowInstruction], Maker] = {
    Intervention: lambda draw, width, out: Intervention(
        draw(4, out), draw(4), draw(4, out), "gelu", subtracts=True, part="first"
    ),
}
