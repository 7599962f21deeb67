"""The instruction set: what an adapter does, independent of the file format it came from.

Canonical form at a linear site, per row:   y = W x + b + scale * B (A x) + add_out
At an embedding site, per token id t:       y = E[t] + scale * B A[:, t]

Every family compiles to these operations; the kernels know nothing else. An operation's tensors live on the
host until the cache copies them into the device arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``y += scale * (x @ a.T) @ b``. Both factors are rank-major, so that any rank is one contiguous block.

    a: [rank, in_features]; b: [rank, out_features] (PEFT's lora_B transposed).
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLowRank:
    """``y += scale * a[token] @ b`` at an embedding. a: [vocabulary, rank]; b: [rank, width]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class SiteOps:
    """What one adapter does at one site. Absent operations cost nothing."""

    low_rank: LowRank | None = None
    token_low_rank: TokenLowRank | None = None
    add_out: Tensor | None = None  # [out_features]; already multiplied by any scale the family has

    def tensors(self) -> Iterator[Tensor]:
        for op in (self.low_rank, self.token_low_rank):
            if op is not None:
                yield op.a
                yield op.b
        if self.add_out is not None:
            yield self.add_out

    @property
    def rank(self) -> int:
        return max((op.rank for op in (self.low_rank, self.token_low_rank) if op is not None), default=0)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterProgram:
    """A compiled adapter: operations at sites of one base model.

    digest: sha256 of the adapter's files, as the registry names the blob.
    family: the PEFT type it was compiled from, e.g. ``LORA``.
    """

    digest: str
    family: str
    ops: Mapping[str, SiteOps]

    @property
    def rank(self) -> int:
        """The largest rank at any site."""
        return max((op.rank for op in self.ops.values()), default=0)

    @property
    def num_elements(self) -> int:
        """Elements of the tensors that the arena has to hold."""
        return sum(t.numel() for op in self.ops.values() for t in op.tensors())
