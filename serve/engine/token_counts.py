"""How often each token of the vocabulary stands in a sequence: kept on the device, for those that ask for penalties."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from onebase.serve.engine.upload import upload


class TokenCounts:
    """Of one running sequence. generated: float32 [vocabulary], how often each was generated; seen: bool [vocabulary],
    whether it stands in the prompt or was generated.

    Preemption drops it with the sequence's pages; a new one catches up from the tokens.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.generated = torch.zeros(vocab_size, device=device)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._counted = 0  # tokens that are generated and counted
        self._knows_prompt = False

    def catch_up(self, tokens: Rows[int], prompt: int, answer: int) -> None:
        """Count what came since it was asked last, in most steps one token. tokens: of the sequence; prompt, answer:
        where they begin in it."""
        if not self._knows_prompt:
            self._see(tokens[prompt:answer])
            self._knows_prompt = True
        new = tokens[answer + self._counted :]
        if new:
            found = self._see(new)
            self.generated.index_add_(0, found, torch.ones_like(found, dtype=torch.float32))
            self._counted += len(new)

    def _see(self, tokens: Rows[int]) -> Tensor:
        found = upload(np.array(tokens, dtype=np.int64), self.seen.device)
        self.seen.index_fill_(0, found, True)
        return found
