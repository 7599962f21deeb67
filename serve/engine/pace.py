"""How many prompt tokens a step may compute beside decoding sequences, by what steps cost on this machine.

A step that also computes a chunk of a prompt takes longer, and everybody who decodes waits for it. So a chunk is as
large as lets the step take ``stretch`` times as long as one without: with 2, a prompt that arrives among streams at
most doubles the time between their tokens, and has half of the machine meanwhile. Where more prompts wait for their
first token than sequences for their next one, a step may take as many times longer, up to ``MOST_CROWDED``. Where
nobody decodes the token budget alone holds.

Two figures are measured: seconds of a step that only decodes, and seconds of a prompt token, which is what a step with
a chunk took beyond that; until there was one, what prompts took alone, which is less. Of the latest steps the median,
or for tokens the dearest third, as a prompt's later chunks attend to more: one that was held up counts for nothing.
"""

from __future__ import annotations

import statistics
from collections import deque

LEAST_CHUNK = 16  # tokens that a step always may compute: prompts get on, whatever was measured
FIRST_CHUNK = 64  # while nothing was measured
MOST_CROWDED = 8.0  # times the time that a chunk may take, where prompts outnumber who decodes
_REMEMBERED = 15  # steps of each kind
_ENOUGH = 64  # prompt tokens of a step from which on what it has besides them does not matter


class Pace:
    """The allowance of prompt tokens. stretch: more than 1; 0: without a bound."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._decodes: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of steps without a chunk
        self._tokens: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of a prompt token beside decodes, by step
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)  # and where nobody decoded

    def allowance(self, num_decoding: int, num_prompts: int, budget: int) -> int:
        """Prompt tokens for a step that has ``budget`` tokens left beside so many decoding sequences. num_prompts: that
        could be computed in it."""
        if not self._stretch or not num_decoding:
            return budget
        tokens = sorted(self._tokens or self._alone)
        if not self._decodes or not tokens:
            return min(budget, FIRST_CHUNK)
        crowd = min(max(1.0, num_prompts / num_decoding), MOST_CROWDED)
        spare = crowd * (self._stretch - 1.0) * statistics.median(self._decodes)
        return min(budget, max(LEAST_CHUNK, int(spare / tokens[2 * len(tokens) // 3])))

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not num_prompt_tokens:
            self._decodes.append(seconds)
        elif num_decoding and self._decodes:
            beyond = seconds - statistics.median(self._decodes)
            self._tokens.append(max(beyond, 0.01 * seconds) / num_prompt_tokens)
        elif num_prompt_tokens >= _ENOUGH:
            self._alone.append(seconds / num_prompt_tokens)
