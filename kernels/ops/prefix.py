"""Keys and values that stand before a sequence: in its pages, or beside them under a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Instruction, wide


@dataclass(frozen=True, slots=True, eq=False)
class KvPrefix(Instruction):
    """K and V of the first slots of every sequence of the adapter, as stored (no rotation is applied to them).

    keys, values: [length, kv_heads, head_dim]. They are copied to the sequence's pages before its first token.
    """

    keys: Tensor
    values: Tensor

    @property
    def scalable(self) -> bool:
        return False

    @property
    def flops(self) -> int:
        return 4 * self.keys.numel()


@dataclass(frozen=True, slots=True, eq=False)
class GatedPrefix(Instruction):
    """out += gate * softmax(scale * q . keys) values, a softmax of its own. Zhang et al., LLaMA-Adapter (2303.16199).

    keys, values: [length, kv_heads, head_dim]; gate: [1] or [heads], float32. projected: whether it is added before the
    output projection of the attention module, or to what the whole module gives.
    """

    kept: ClassVar[tuple[str, ...]] = ("gate",)
    keys: Tensor
    values: Tensor
    gate: Tensor
    projected: bool = True

    def delta(self, q: Tensor, scale: float) -> Tensor:
        """q: [n, heads, head_dim], rotated as for the real keys -> the same shape in float32."""
        query = _grouped(q, self.keys.shape[1])
        logits = torch.einsum("nkgd,tkd->nkgt", query, wide(self.keys)) * scale
        mixed = torch.einsum("nkgt,tkd->nkgd", torch.softmax(logits, dim=-1), wide(self.values))
        return mixed.flatten(1, 2) * self.gate[:, None]

    @classmethod
    def batched(cls, ops: Sequence[Self], lengths: Sequence[int], q: Tensor, scale: float) -> Tensor:
        """Several programs at once: q holds lengths[i] rows of ops[i], one run after the other.

        In decode, where each has one row, prefixes of one length share their launches.
        """
        if len(ops) == 1 or len(q) > len(ops) or len({len(op.keys) for op in ops}) > 1:
            parts = torch.split(q, list(lengths))
            return torch.cat([op.delta(part, scale) for op, part in zip(ops, parts, strict=True)])
        keys, values = (wide(torch.stack(each)) for each in ([op.keys for op in ops], [op.values for op in ops]))
        logits = torch.einsum("nkgd,ntkd->nkgt", _grouped(q, keys.shape[2]), keys) * scale
        mixed = torch.einsum("nkgt,ntkd->nkgd", torch.softmax(logits, dim=-1), values)
        return mixed.flatten(1, 2) * torch.stack([op.gate.expand(q.shape[1]) for op in ops])[:, :, None]


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[n, heads, head_dim] -> [n, kv_heads, heads of each, head_dim], in float32 or wider."""
    return wide(q).reshape(len(q), kv_heads, q.shape[1] // kv_heads, q.shape[2])
