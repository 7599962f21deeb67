"""Instructions of embeddings: the output row of some tokens is another one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.kernels.ops.instruction import Instruction


@dataclass(frozen=True, slots=True, eq=False)
class TokenInstruction(Instruction, ABC):
    """An instruction at an embedding site."""

    @abstractmethod
    def apply(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """The rows with their replacements. tokens: [n] int64; rows: [n, width], what the embedding gave them.

        Virtual tokens (a soft prompt's) have negative ids: -1 is the first of them.
        """

    @abstractmethod
    def reference(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """The definition: the test holds ``apply`` to it."""

    @property
    def flops(self) -> int:
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows(TokenInstruction):
    """Tokens index[k] get the row weight[k], whatever the base holds for them.

    index: [n] int32, ascending and distinct; weight: [n, width], any scale of the embedding included.
    """

    index: Tensor
    weight: Tensor

    def apply(self, tokens: Tensor, rows: Tensor) -> Tensor:
        at = torch.searchsorted(self.index, tokens.to(self.index.dtype)).clamp_(max=len(self.index) - 1)
        return torch.where((self.index[at] == tokens)[:, None], self.weight[at].to(rows.dtype), rows)

    def reference(self, tokens: Tensor, rows: Tensor) -> Tensor:
        out = rows.clone()
        for token, row in zip(self.index.tolist(), self.weight, strict=True):
            out[tokens == token] = row.to(rows.dtype)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt(TokenInstruction):
    """The rows of the virtual tokens that stand before the prompt. weight: [num_virtual_tokens, width]."""

    weight: Tensor

    @property
    def scalable(self) -> bool:
        return False

    def apply(self, tokens: Tensor, rows: Tensor) -> Tensor:
        virtual = (-1 - tokens).clamp_(min=0, max=len(self.weight) - 1)
        return torch.where((tokens < 0)[:, None], self.weight[virtual].to(rows.dtype), rows)

    def reference(self, tokens: Tensor, rows: Tensor) -> Tensor:
        out = rows.clone()
        for row, token in enumerate(tokens.tolist()):
            if token < 0:
                out[row] = self.weight[-1 - token].to(rows.dtype)
        return out
