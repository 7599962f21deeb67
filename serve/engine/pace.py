"""How many prompt tokens a step may compute beside decoding sequences, by what steps cost on this machine.

A step that also computes a chunk of a prompt takes longer, and everybody who decodes waits for it. So a chunk is as
large as lets the step take ``stretch`` times as long as one without: with 2, a prompt that arrives among streams at
most doubles the time between their tokens, and has half of the machine meanwhile. Where more prompts wait for their
first token than sequences for their next one, a step may take as many times longer, up to ``MOST_CROWDED``. The time
of those who sit the step out (courtesy.py) goes to the chunk, too. Where nobody decodes the token budget alone holds.

Measured are the seconds of a step that only decodes, by how many do, and what a step with a chunk takes beyond that:
something for having a chunk at all (a second adapter's weights, other kernels), and something for each token of it.
Were all of it put on the tokens, small chunks would look dear and so stay small. Both are lines, Theil and Sen's:
medians over the latest steps, so that one that was held up counts for nothing. Until chunks of different lengths were
seen, a token costs what it did where prompts were alone; until steps of different numbers were, a sequence costs next
to nothing.
"""

from __future__ import annotations

import math
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
    """Seconds of so many: ``once``, and ``each`` for every one."""

    once: float
    each: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]], otherwise: float, apart: int) -> _Line:
        """Of (count, seconds), at least one. otherwise: what each takes, where no two counts are so far ``apart``."""
        slopes = [(t - s) / (m - n) for (n, s), (m, t) in combinations(points, 2) if abs(m - n) >= apart]
        each = statistics.median(slopes) if slopes else otherwise
        whole = statistics.median(seconds / count for count, seconds in points)  # were it each one's and no more
        each = min(max(each, _LEAST_SHARE * whole), whole)
        return cls(max(statistics.median(seconds - each * count for count, seconds in points), 0.0), each)

    def at(self, count: int) -> float:
        return self.once + self.each * count


class Pace:
    """The allowance of prompt tokens. stretch: more than 1; 0: without a bound."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._decodes: deque[tuple[int, float]] = deque(
            maxlen=_REMEMBERED
        )  # sequences, seconds of steps without a chunk
        self._chunks: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)  # tokens beside decodes, seconds for them
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of a token where nobody decoded
        self._decode_line: _Line | None = None  # as far as it was asked for
        self._chunk_line: _Line | None = None

    def allowance(self, num_decoding: int, num_prompts: int, budget: int, sitting_out: int = 0) -> int:
        """Prompt tokens for a step that has ``budget`` tokens left beside so many decoding sequences. num_prompts: that
        could be computed in it; sitting_out: sequences that would decode, too."""
        waiting = num_decoding + sitting_out
        if not self._stretch or not waiting:
            return budget
        if not self._decodes or self._chunk_line is None:
            return min(budget, FIRST_CHUNK)
        crowd = min(max(1.0, num_prompts / waiting), MOST_CROWDED)
        decode = self._decoding()
        spare = crowd * (self._stretch - 1.0) * decode.at(waiting) + decode.each * sitting_out
        return min(budget, max(LEAST_CHUNK, int((spare - self._chunk_line.once) / self._chunk_line.each)))

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not num_prompt_tokens:
            self._decodes.append((num_decoding, seconds))
            self._decode_line = None
            return
        if num_decoding and self._decodes:
            beyond = seconds - self._decoding().at(num_decoding)
            self._chunks.append((num_prompt_tokens, max(beyond, 0.01 * seconds)))
        elif num_prompt_tokens >= _ENOUGH:
            self._alone.append(seconds / num_prompt_tokens)
        alone = statistics.median(self._alone) if self._alone else math.inf  # a token costs no more than all of it
        if self._chunks:
            self._chunk_line = _Line.through(self._chunks, alone, _APART)
        elif self._alone:
            self._chunk_line = _Line(0.0, alone)

    def _decoding(self) -> _Line:
        """Of steps that only decode. Most steps do, and ask for nothing."""
        if self._decode_line is None:
            self._decode_line = _Line.through(self._decodes, 0.0, 1)
        return self._decode_line
