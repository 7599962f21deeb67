"""Keys and values that stand before a sequence: in its pages, or beside them under a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
        group = q.shape[1] // self.keys.shape[1]
        query = wide(q).reshape(len(q), self.keys.shape[1], group, q.shape[2])
        logits = torch.einsum("nkgd,tkd->nkgt", query, wide(self.keys)) * scale
        mixed = torch.einsum("nkgt,tkd->nkgd", torch.softmax(logits, dim=-1), wide(self.values))
        return mixed.flatten(1, 2) * self.gate[:, None]
