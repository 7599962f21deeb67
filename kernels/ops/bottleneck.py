"""Bottleneck adapters: up(act(down z)).

Houlsby et al. (1902.00751), Pfeiffer et al. (2005.00247), He et al. (2110.04366).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.kernels.ops.instruction import Instruction, Phase, RowInstruction, wide

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

    def delta(self, output: Tensor, residual: Tensor) -> Tensor:
        """output, residual: [n, width] -> what is added to the output, in float32."""
        return self._forward(_source(self.reads, output, residual))

    def reference(self, output: Tensor, residual: Tensor) -> Tensor:
        return self._reference(_source(self.reads, output.double(), residual.double()))


def _source(reads: Reads, output: Tensor, residual: Tensor) -> Tensor:
    if reads == "output":
        return output
    return output + residual if reads == "sum" else residual
