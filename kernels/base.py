"""The contract of the low-rank kernels: one signature, three bodies (Triton, fast CPU, reference)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, TypeVar

from torch import Tensor

from onebase.kernels.plan import BatchPlan

NOTHING: Mapping[int, Tensor] = MappingProxyType({})


class Shrunk:
    """What a shrink hands to its expands. It belongs to the body that made it; callers only carry it."""


S = TypeVar("S", bound=Shrunk)


def own(shrunk: Shrunk, kind: type[S]) -> S:
    """The shrunk as this body's own. Raises TypeError for another body's."""
    if not isinstance(shrunk, kind):
        raise TypeError(f"shrunk: {type(shrunk).__name__} was made by another body; allowed is {kind.__name__}")
    return shrunk


class LowRankKernels(Protocol):
    """Low-rank updates and vectors of the rows of a batch, each row by its own programs.

    x, y and the arena buffer share one floating dtype and device. Rows outside every segment of the plan are never
    written. A plan may only name installed programs: KeyError otherwise. Where a site reads its operands by the wrong
    one of expand and token_low_rank, ValueError.
    """

    @property
    def name(self) -> str:
        """triton, cpu or reference."""

    def shrink(self, x: Tensor, group: tuple[int, ...], plan: BatchPlan) -> Shrunk:
        """xa = x @ A.T per row, for all sites of the group at once; they read the same x.

        x: [plan.num_rows, in_features], last stride 1.
        """

    def expand(self, y: Tensor, shrunk: Shrunk, site: int, plan: BatchPlan) -> None:
        """y[row] += segment.scale * (op.scale * xa[row] @ B + add_out + map(y[row])), in place; shrunk's group includes
        the site.

        map: gain * y, or a rotation of pairs, of what y is before any program of the row; see Operands.
        y: [plan.num_rows, out_features], last stride 1, any row stride (a slice of a fused output).
        """

    def expand_group(
        self,
        ys: Sequence[Tensor],
        shrunk: Shrunk,
        sites: tuple[int, ...],
        plan: BatchPlan,
        origins: Mapping[int, Tensor] = NOTHING,
    ) -> None:
        """``expand`` at several sites of the shrunk's group, each into its own y; in one launch where bodies can.

        origins: by site, what maps read instead of y, where something has been added to that already.
        """

    def scale_in(self, target: Tensor, x: Tensor, site: int, plan: BatchPlan) -> None:
        """target[row] += segment.scale * gain_in * x[row], in place. Both [plan.num_rows, in_features], not the same
        memory, last stride 1."""

    def token_low_rank(self, y: Tensor, tokens: Tensor, site: int, plan: BatchPlan) -> None:
        """y[row] += segment.scale * (op.scale * A[tokens[row]] @ B + add_out), in place.

        y: [plan.num_rows, width]; tokens: [plan.num_rows] int64, each known to be in [0, vocabulary).
        """

    def forget(self, handle: int) -> None:
        """Drop what is cached of a program. Called when it is removed from the tables."""

    def warm_up(self, groups: Iterable[tuple[int, ...]] = ()) -> None:
        """Compile what serving may need, by launches on data of its own. Bodies that compile nothing do nothing.

        groups: the sites whose shrinks and expands go together.
        """
