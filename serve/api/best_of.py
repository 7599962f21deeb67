"""best_of: more choices are generated than answered, and the likeliest stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebase.serve.api.answer import Choice


@dataclass(frozen=True, slots=True)
class BestOf:
    """kept: how many choices of each prompt. tells: their log-probabilities were asked for, not only needed here."""

    kept: int
    tells: bool

    def pick(self, choices: Sequence[Choice], candidates: int) -> list[Choice]:
        """Of each prompt's ``candidates``, one after the other, those whose tokens have the highest mean
        log-probability, best first, with the indices of the answer."""
        found: list[Choice] = []
        for start in range(0, len(choices), candidates):
            ranked = sorted(choices[start : start + candidates], key=_mean, reverse=True)
            found += ranked[: self.kept]
        return [
            replace(choice, index=index, scores=choice.scores if self.tells else ())
            for index, choice in enumerate(found)
        ]


def _mean(choice: Choice) -> float:
    """Of the generated tokens, which come after those of an echoed prompt."""
    told = choice.scores[len(choice.scores) - choice.tokens :]
    return sum(score.logprob or 0.0 for score in told) / max(len(told), 1)
