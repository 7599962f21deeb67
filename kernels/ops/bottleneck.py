"""Bottleneck adapters: up(act(down z)).

Houlsby et al. (1902.00751), Pfeiffer et al. (2005.00247), He et al. (2110.04366).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels.ops.instruction import Instruction, Phase, RowInstruction, wide
from onebase.kernels.ops.stacking import stacked

Reads = Literal["output", "sum", "residual"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "leakyrelu": torch.nn.functional.leaky_relu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck(Instruction):
    """f(z) = scale * up(act(down z)).

    down: [rank, width_in]; up: [width_out, rank]; scale: [1] or [width_out]; biases may be absent.
    activation: a key of ACTIVATIONS.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "identity"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scalable(self) -> bool:
        return False  # not linear in its input: halves do not add up to the whole where two of them meet

    def _forward(self, rows: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](wide(linear(rows, self.down, self.down_bias))).to(rows.dtype)
        return wide(linear(inner, self.up, self.up_bias)) * self.scale

    def _reference(self, rows: Tensor) -> Tensor:
        inner = rows.double() @ self.down.double().T
        if self.down_bias is not None:
            inner = inner + self.down_bias.double()
        out = ACTIVATIONS[self.activation](inner) @ self.up.double().T
        if self.up_bias is not None:
            out = out + self.up_bias.double()
        return out * self.scale.double()


@dataclass(frozen=True, slots=True, eq=False)
class RowBottleneck(Bottleneck, RowInstruction):
    """A bottleneck at a linear site; its phase is its place."""

    def delta(self, rows: Tensor) -> Tensor:
        return self._forward(rows)

    def reference(self, rows: Tensor) -> Tensor:
        return self._reference(rows)

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """Single rows of bottlenecks of one shape: two products for all of them."""
        return stacked(ops, lengths, rows, _shape, _one_row_each)


@dataclass(frozen=True, slots=True, eq=False)
class InputBottleneck(RowBottleneck):
    """W (x + f(x)): in series before a linear module."""

    phase: ClassVar[Phase] = Phase.INPUT


@dataclass(frozen=True, slots=True, eq=False)
class OutputBottleneck(RowBottleneck):
    """y + f(y): in series after a linear module."""

    phase: ClassVar[Phase] = Phase.MAP


@dataclass(frozen=True, slots=True, eq=False)
class ParallelBottleneck(RowBottleneck):
    """y + f(x): beside a linear module."""

    phase: ClassVar[Phase] = Phase.ADD


@dataclass(frozen=True, slots=True, eq=False)
class BlockBottleneck(Bottleneck):
    """At the output m of an attention or feed-forward block whose residual stream is r: m += f(z).

    reads: what z is: ``output`` m (Houlsby), ``sum`` m + r (Pfeiffer), ``residual`` r (parallel).
    """

    reads: Reads = "output"

    def reference(self, output: Tensor, residual: Tensor) -> Tensor:
        return self._reference(_source(self.reads, output.double(), residual.double()))

    @classmethod
    def deltas(cls, ops: Sequence[Self], outputs: Sequence[Tensor], residuals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """outputs, residuals: [n, width] of each -> what is added to each output, float32."""
        sources = [_source(op.reads, m, r) for op, m, r in zip(ops, outputs, residuals, strict=True)]
        lengths = [len(source) for source in sources]
        beside = [ParallelBottleneck(op.down, op.up, op.scale, op.down_bias, op.up_bias, op.activation) for op in ops]
        return torch.split(ParallelBottleneck.batched(beside, lengths, torch.cat(sources)), lengths)


def _source(reads: Reads, output: Tensor, residual: Tensor) -> Tensor:
    if reads == "output":
        return output
    return output + residual if reads == "sum" else residual


def _shape(op: Bottleneck) -> Hashable:
    biases = op.down_bias is None, op.up_bias is None
    return op.down.shape, op.up.shape, op.scale.shape, biases, op.activation


def _one_row_each(ops: Sequence[Bottleneck], rows: Tensor) -> Tensor:
    """rows: [len(ops), width] -> [len(ops), width of the target]."""
    inner = torch.bmm(torch.stack([op.down for op in ops]), rows[:, :, None])[:, :, 0]
    inner = _plus(inner, [op.down_bias for op in ops])
    inner = ACTIVATIONS[ops[0].activation](wide(inner)).to(rows.dtype)
    out = torch.bmm(torch.stack([op.up for op in ops]), inner[:, :, None])[:, :, 0]
    return wide(_plus(out, [op.up_bias for op in ops])) * torch.stack([op.scale for op in ops])


def _plus(rows: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    present = [bias for bias in biases if bias is not None]
    return rows + torch.stack(present) if present else rows
