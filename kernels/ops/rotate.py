"""Rotations of coordinates: in blocks and butterflies of them before a linear module, in pairs after it, and of what an
embedding gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Phase, RowInstruction, repeated, wide
from onebase.kernels.ops.stacking import stacked
from onebase.kernels.ops.tokens import TokenInstruction


@dataclass(frozen=True, slots=True, eq=False)
class BlockRotateIn(RowInstruction):
    """x R before the base, R block-diagonal. Qiu et al., "OFT" (2306.07280).

    turn: [blocks, size, size], R's blocks less the identity, or [1, size, size] where all are the same one.
    width: features of x, a multiple of size.
    """

    phase: ClassVar[Phase] = Phase.INPUT
    turn: Tensor
    width: int

    @property
    def flops(self) -> int:
        return 2 * self.width * self.turn.shape[1]

    def delta(self, rows: Tensor) -> Tensor:
        return _turned(rows, self.turn)

    def reference(self, rows: Tensor) -> Tensor:
        return rows.double() @ _matrix(self.turn, self.width)

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """One product of stacked blocks for all single rows with blocks of one size."""
        return stacked(ops, lengths, rows, lambda op: tuple(op.turn.shape), _one_row_each)


def _one_row_each(ops: Sequence[BlockRotateIn], rows: Tensor) -> Tensor:
    """rows: [len(ops), width] -> the same shape."""
    turns = torch.cat([op.turn for op in ops])  # [ops * blocks, size, size]
    return torch.bmm(rows.reshape(len(turns), -1, turns.shape[1]), turns).view(rows.shape)


def _turned(rows: Tensor, turn: Tensor) -> Tensor:
    """rows [n, width] times blocks [width / size or 1, size, size]."""
    if turn.shape[0] == 1:
        return (rows.reshape(-1, turn.shape[1]) @ turn[0]).view(rows.shape)
    return _in_blocks(rows, turn)


def _matrix(turn: Tensor, width: int) -> Tensor:
    """[width, width] in float64, block by block: for references."""
    size = turn.shape[1]
    matrix = torch.zeros(width, width, dtype=torch.float64, device=turn.device)
    for at in range(width // size):
        part = slice(at * size, (at + 1) * size)
        matrix[part, part] = turn[at % len(turn)].double()
    return matrix


def _in_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """rows [n, width] times the block-diagonal matrix of blocks [width / size, size, size]."""
    apart = rows.reshape(len(rows), *blocks.shape[:2]).transpose(0, 1)  # [blocks, n, size]
    return torch.bmm(apart, blocks).transpose(0, 1).reshape(rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRotate(TokenInstruction):
    """E[t] R for every token, the virtual ones included. turn and width: as of BlockRotateIn."""

    turn: Tensor
    width: int

    @property
    def flops(self) -> int:
        return 2 * self.width * self.turn.shape[1]

    def apply(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return (wide(rows) + wide(_turned(rows, self.turn))).to(rows.dtype)

    def reference(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return rows.double() + rows.double() @ _matrix(self.turn, self.width)


@dataclass(frozen=True, slots=True, eq=False)
class ButterflyIn(RowInstruction):
    """x B_m ... B_1 before the base, each B block-diagonal under a permutation. Liu et al., "BOFT" (2311.06243).

    turns: [stages, blocks, size, size], the blocks less the identity. In stage i a block's two halves lie 2^i half
    blocks apart. The last stage is applied first.
    """

    phase: ClassVar[Phase] = Phase.INPUT
    turns: Tensor

    def delta(self, rows: Tensor) -> Tensor:
        state = wide(rows)
        for stage in reversed(range(len(self.turns))):
            together = self._joined(state.to(rows.dtype), 2, 1 << stage)
            state = state + self._joined(_in_blocks(together, self.turns[stage]), 1 << stage, 2)
        return state - wide(rows)

    def _joined(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        """Half blocks that lie ``inner`` apart come side by side; with swapped numbers they go back."""
        half = self.turns.shape[-1] // 2
        if outer == 1 or inner == 1:
            return rows
        return rows.reshape(len(rows), -1, outer, inner, half).transpose(2, 3).reshape(rows.shape)

    def reference(self, rows: Tensor) -> Tensor:
        width = rows.shape[1]
        whole = torch.eye(width, dtype=torch.float64, device=rows.device)
        for stage in reversed(range(len(self.turns))):
            order = _butterfly(width, self.turns.shape[-1] // 2, 1 << stage).to(rows.device)
            turn = torch.zeros_like(whole)
            turn[order[:, None], order[None, :]] = _matrix(self.turns[stage], width)
            whole = whole @ (torch.eye(width, dtype=torch.float64, device=rows.device) + turn)
        return rows.double() @ whole - rows.double()


def _butterfly(width: int, half: int, apart: int) -> Tensor:
    """The coordinates in the order in which a stage's blocks take them."""
    order: list[int] = []
    for group in range(0, width, 2 * half * apart):
        for pair in range(apart):
            for start in (group + pair * half, group + (pair + apart) * half):
                order.extend(range(start, start + half))
    return torch.tensor(order)


@dataclass(frozen=True, slots=True, eq=False)
class PairRotateOut(RowInstruction):
    """Pairs (a, b) of outputs, bias included, become (a c - b s, b c' + a s'). Liao and Monz, "RoAd" (2409.00119).

    A pair lies half a group apart. cosine: [out_features], c less one; sine: [out_features]: s at a, s' at b.
    """

    phase: ClassVar[Phase] = Phase.MAP
    cosine: Tensor
    sine: Tensor
    group: int

    @property
    def flops(self) -> int:
        return 3 * self.cosine.numel()

    def delta(self, rows: Tensor) -> Tensor:
        return wide(rows) * self.cosine + _crossed(wide(rows), self.group) * self.sine

    def reference(self, rows: Tensor) -> Tensor:
        matrix = torch.diag(self.cosine.double())
        half = self.group // 2
        for a in range(len(self.sine)):
            if a % self.group < half:
                matrix[a, a + half] -= self.sine[a].double()
                matrix[a + half, a] += self.sine[a + half].double()
        return rows.double() @ matrix.T

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], rows: Tensor) -> Tensor:
        """Element-wise over all rows where the groups are of one size."""
        if len(ops) == 1 or any(op.group != ops[0].group for op in ops):
            parts = torch.split(rows, list(lengths))
            return torch.cat([op.delta(part) for op, part in zip(ops, parts, strict=True)])
        cosine, sine = repeated([op.cosine for op in ops], lengths), repeated([op.sine for op in ops], lengths)
        return wide(rows) * cosine + _crossed(wide(rows), ops[0].group) * sine


def _crossed(rows: Tensor, group: int) -> Tensor:
    """(-b, a) for each pair (a, b)."""
    a, b = rows.reshape(len(rows), -1, 2, group // 2).unbind(2)
    return torch.stack((-b, a), dim=2).reshape(rows.shape)
