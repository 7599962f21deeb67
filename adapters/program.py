"""The instruction set: what an adapter does, independent of the file format it came from.

Every family compiles to operations at sites of the base, and the kernels know nothing else. At a linear site, per row,
with ``x' = x + sum of input deltas`` and ``y0 = W x' + b``:

    y = y0 + sum of map deltas of y0 + sum of low rank, dense, sparse, ... deltas of x + add_out

All of it is a delta, so programs on one row add up, each with its scale. At an embedding site, per token id t:
``y = E[t] + scale * B A[:, t]``, then the instructions that replace rows. Norms, attention and blocks have their own.
Which instruction may stand where: ``SITE_INSTRUCTIONS``. Their arithmetic is in kernels/ops/.

An operation's tensors live on the host until the cache copies them into the device arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.base import SiteKind
from onebase.kernels.ops.bottleneck import BlockBottleneck
from onebase.kernels.ops.experts import ExpertLowRank, RouterLowRank
from onebase.kernels.ops.instruction import Instruction, Phase, RowInstruction
from onebase.kernels.ops.norm import NormOverride
from onebase.kernels.ops.prefix import GatedPrefix, KvPrefix
from onebase.kernels.ops.reft import Intervention
from onebase.kernels.ops.tokens import TokenInstruction
from onebase.kernels.ops.vector import ScaleOut

SITE_INSTRUCTIONS: Mapping[SiteKind, tuple[type[Instruction], ...]] = {
    SiteKind.LINEAR: (RowInstruction,),
    SiteKind.EMBEDDING: (TokenInstruction, ScaleOut),
    SiteKind.NORM: (NormOverride,),
    SiteKind.LAYER: (Intervention,),
    SiteKind.ATTENTION: (KvPrefix, GatedPrefix, BlockBottleneck),
    SiteKind.MLP: (BlockBottleneck,),
    SiteKind.EXPERTS: (ExpertLowRank,),
    SiteKind.ROUTER: (RouterLowRank,),
}


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
    """What one adapter does at one site. Absent operations cost nothing.

    The first three are frequent and have kernels of their own. ``extra``: everything else, in no order that matters.
    """

    low_rank: LowRank | None = None
    token_low_rank: TokenLowRank | None = None
    add_out: Tensor | None = None  # [out_features]; already multiplied by any scale the family has
    extra: tuple[Instruction, ...] = ()

    @property
    def is_fast(self) -> bool:
        """Whether the low-rank kernels have anything to do."""
        return self.low_rank is not None or self.token_low_rank is not None or self.add_out is not None

    def fast_tensors(self) -> Iterator[Tensor]:
        for op in (self.low_rank, self.token_low_rank):
            if op is not None:
                yield op.a
                yield op.b
        if self.add_out is not None:
            yield self.add_out

    def tensors(self) -> Iterator[Tensor]:
        yield from self.fast_tensors()
        for instruction in self.extra:
            for _, tensor in instruction.tensors():
                yield tensor

    @property
    def rank(self) -> int:
        fast = [op.rank for op in (self.low_rank, self.token_low_rank) if op is not None]
        return max([*fast, *(instruction.rank for instruction in self.extra)], default=0)

    @property
    def scalable(self) -> bool:
        """Whether any scale means something here: each part is, and no map reads what an input delta changed."""
        phases = {type(op).phase for op in self.extra if isinstance(op, RowInstruction)}
        return all(op.scalable for op in self.extra) and not {Phase.INPUT, Phase.MAP} <= phases


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A classification head over what the output head reads. weight: [num_labels, width] float32; bias: [num_labels]
    float32. per_token: it speaks of every token (TOKEN_CLS), not of the sequence."""

    weight: Tensor
    bias: Tensor | None = None
    per_token: bool = False

    @property
    def num_labels(self) -> int:
        return self.weight.shape[0]

    def tensors(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of a prompt on which an adapter acts: the ``first`` first and the ``last`` last ones. Where they
    overlap, a token is one of the last. A prompt must have at least ``shortest`` tokens."""

    first: int
    last: int
    shortest: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class AdapterProgram:
    """A compiled adapter: operations at sites of one base model.

    digest: sha256 of the adapter's files, as the registry names the blob.
    family: the PEFT type it was compiled from, e.g. ``LORA``.
    num_virtual_tokens: slots that stand before the prompt (a SoftPrompt's or a KvPrefix's length).
    first_position: the position of the first real token: num_virtual_tokens, or 0 where the prefix takes no positions.
    invocation: the adapter acts from the start of the last match of these tokens on, and on no row where they do not
    occur (activated LoRA); empty: it acts on every row.
    head: what classification requests read; the others do not see it. It knows no scale.
    window: the adapter acts on these tokens of the prompt, and on no generated one (ReFT); None: on every row.
    """

    digest: str
    family: str
    ops: Mapping[str, SiteOps]
    num_virtual_tokens: int = 0
    first_position: int = 0
    invocation: tuple[int, ...] = ()
    head: Head | None = None
    window: Window | None = None

    @property
    def rank(self) -> int:
        """The largest rank at any site."""
        return max((op.rank for op in self.ops.values()), default=0)

    @property
    def scalable(self) -> bool:
        """Whether the adapter can be given other scales than 0 and 1."""
        return all(op.scalable for op in self.ops.values())

    @property
    def num_elements(self) -> int:
        """Elements of all its tensors."""
        own = sum(t.numel() for op in self.ops.values() for t in op.tensors())
        return own if self.head is None else own + sum(t.numel() for t in self.head.tensors())
