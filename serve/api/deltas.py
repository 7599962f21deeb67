"""News of a choice, on its way from the engine to JSON."""

from __future__ import annotations

from dataclasses import dataclass

from onebase.serve.api.tools.parser import CallPiece
from onebase.serve.engine.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice: text that is certain, how many tokens came, and why it ended if it did.

    scores: of these tokens, with ``echo`` of the prompt's in the first delta; prompt: of the prompt's, once. Both are
    empty unless they were asked for. calls: of tools; a delta with calls has no text.
    """

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    scores: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    calls: tuple[CallPiece, ...] = ()

    @property
    def is_plain(self) -> bool:
        return not self.scores and not self.prompt and not self.calls

    @property
    def num_values(self) -> int:
        """How much there is to write: tokens, and log-probabilities with their alternatives."""
        told = (*self.scores, *self.prompt)
        return self.tokens + len(told) * (1 + len(told[-1].top)) if told else self.tokens
