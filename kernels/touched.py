"""Touched: at which sites programs of the tables do what. What nobody touches costs no launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebase.kernels.tables import Operands


@dataclass(frozen=True, slots=True)
class Touched:
    """Sites at which programs change the output; of these, where they map it (gain); and where they scale the input."""

    outputs: frozenset[int] = frozenset()
    maps: frozenset[int] = frozenset()
    inputs: frozenset[int] = frozenset()

    @classmethod
    def of(cls, operands: Mapping[int, Operands]) -> Touched:
        items = operands.items()
        return cls(
            frozenset(site for site, op in items if op.changes_output),
            frozenset(site for site, op in items if op.gain >= 0),
            frozenset(site for site, op in items if op.gain_in >= 0),
        )

    @classmethod
    def any_of(cls, parts: Sequence[Touched]) -> Touched:
        found = ([part.outputs for part in parts], [part.maps for part in parts], [part.inputs for part in parts])
        return cls(*(frozenset[int]().union(*column) for column in found))

    def covers(self, other: Touched) -> bool:
        """Whether outputs and inputs are changed wherever the other changes them."""
        return self.outputs >= other.outputs and self.inputs >= other.inputs

    @property
    def count(self) -> int:
        return len(self.outputs) + len(self.inputs)


NOWHERE = Touched()
