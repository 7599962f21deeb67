"""How many prompt tokens a step may compute beside decoding sequences, by what steps cost on this machine.

A step that also computes a chunk of a prompt takes longer, and everybody who decodes waits for it. So a chunk is as
large as lets the step take ``stretch`` times as long as one without: with 2, a prompt that arrives among streams at
most doubles the time between their tokens, and has half of the machine meanwhile. Where more prompts wait for their
first token than sequences for their next one, a step may take as many times longer, up to ``MOST_CROWDED``. The time
of those who sit the step out (courtesy.py) goes to the chunk, too. Where nobody decodes the token budget alone holds.

Measured are the seconds of a step that only decodes, and what a step with a chunk takes beyond that: something for
having a chunk at all (a second adapter's weights, other kernels), and something for each token of it. Were all of it
put on the tokens, small chunks would look dear and so stay small. The line is Theil and Sen's: medians over the latest
steps, so that one that was held up counts for nothing; and they are steps beside about as many sequences as those that
only decoded. Until chunks of different lengths were seen, a token costs what
it did where prompts were alone.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

LEAST_CHUNK = 16  # tokens that a step always may compute: prompts get on, whatever was measured
FIRST_CHUNK = 64  # while nothing was measured
MOST_CROWDED = 8.0  # times the time that a chunk may take, where prompts outnumber who decodes
_REMEMBERED = 15  # steps of each kind
_APART = 12  # tokens between two chunks that tell what a token costs
_LEAST_SHARE = 0.02  # of what a chunk takes, that is its tokens': where noise says that they are free
_ENOUGH = 64  # prompt tokens of a step from which on what it has besides them does not matter


@dataclass(frozen=True, slots=True)
class _Line:
    """Seconds of a chunk: ``once``, and ``each`` for every token."""

    once: float
    each: float

    @classmethod
    def through(cls, chunks: Sequence[tuple[int, float]], alone: float | None) -> _Line | None:
        """Of (tokens, seconds); alone: seconds of a token where prompts were alone. None where neither tells."""
        slopes = [(t - s) / (m - n) for (n, s), (m, t) in combinations(chunks, 2) if abs(m - n) >= _APART]
        each = statistics.median(slopes) if slopes else alone
        if not chunks:
            return None if each is None else cls(0.0, each)
        whole = statistics.median(seconds / tokens for tokens, seconds in chunks)  # were a chunk its tokens and no more
        each = whole if each is None else min(max(each, _LEAST_SHARE * whole), whole)
        return cls(max(statistics.median(seconds - each * tokens for tokens, seconds in chunks), 0.0), each)


class Pace:
    """The allowance of prompt tokens. stretch: more than 1; 0: without a bound."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._decodes: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of steps without a chunk
        self._rows: deque[int] = deque(maxlen=_REMEMBERED)  # and how many decoded in each
        self._chunks: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)  # tokens beside decodes, seconds for them
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of a token where nobody decoded
        self._line: _Line | None = None

    def allowance(self, num_decoding: int, num_prompts: int, budget: int, sitting_out: int = 0) -> int:
        """Prompt tokens for a step that has ``budget`` tokens left beside so many decoding sequences. num_prompts: that
        could be computed in it; sitting_out: sequences that would decode, too."""
        waiting = num_decoding + sitting_out
        if not self._stretch or not waiting:
            return budget
        if not self._decodes or self._line is None:
            return min(budget, FIRST_CHUNK)
        crowd = min(max(1.0, num_prompts / waiting), MOST_CROWDED)
        spare = (crowd * (self._stretch - 1.0) + sitting_out / waiting) * statistics.median(self._decodes)
        return min(budget, max(LEAST_CHUNK, int((spare - self._line.once) / self._line.each)))

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not num_prompt_tokens:
            self._decodes.append(seconds)
            self._rows.append(num_decoding)
            return
        if num_decoding and self._decodes:
            if 2 * num_decoding < statistics.median(self._rows):
                return  # most of them sat it out: what the chunk took is not what is beyond the others
            beyond = seconds - statistics.median(self._decodes)
            self._chunks.append((num_prompt_tokens, max(beyond, 0.01 * seconds)))
        elif num_prompt_tokens >= _ENOUGH:
            self._alone.append(seconds / num_prompt_tokens)
        self._line = _Line.through(self._chunks, statistics.median(self._alone) if self._alone else None)
