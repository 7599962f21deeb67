"""What tenants under their share of the seats get beside those over theirs: their prompts in one go, and others' time.

A prompt waits for its own tokens, and for those of everybody who decodes in the same steps. Who is over its share need
not be among them: it sits out, and its time is the prompt's (pace.py). That is every other step at the most, so that a
stream is held up and never stopped; and it is for prompts that are at least as urgent.

Nor does a prompt lose its turn by its own tokens once ``SOON`` steps will do for the rest: two that took turns would
both end when the second one does. A longer one goes by the counters, so that short ones pass it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from onebase.serve.engine.fairness import Fairness
from onebase.serve.engine.sequence import Sequence

SOON = 2  # steps in which a prompt ends, so that it keeps its turn


class Courtesy:
    """Asked once in every step that may have prompts. Pages do not count here: who sits out keeps its own."""

    def __init__(self, fairness: Fairness, max_num_seqs: int) -> None:
        self._fairness = fairness
        self._max_num_seqs = max_num_seqs
        self._sat_out = False  # somebody did, the last time

    def over(self, running: Iterable[Sequence]) -> Collection[str]:
        """Tenants with more than their share of the seats, and more than one."""
        if len(self._fairness.active) < 2:
            return ()
        seats = Counter(sequence.request.tenant for sequence in running)
        share = self._fairness.entitlement
        return {tenant for tenant, count in seats.items() if count > max(1.0, share(tenant) * self._max_num_seqs)}

    def going_on(
        self,
        decoding: list[Sequence],
        prefilling: Iterable[Sequence],
        over: Collection[str],
        next_one: Callable[[], Sequence | None],
    ) -> list[Sequence]:
        """Those that decode in this step. prefilling: prompts that were begun; over: tenants; next_one: of those that
        wait, who could start."""
        may, self._sat_out = not self._sat_out, False
        if not may or not any(one.request.tenant in over for one in decoding):
            return decoding
        urgency = min((one.request.priority for one in prefilling if one.request.tenant not in over), default=None)
        if urgency is None and (first := next_one()) is not None and first.request.tenant not in over:
            urgency = first.request.priority
        if urgency is None:
            return decoding
        staying = [one for one in decoding if one.request.priority < urgency or one.request.tenant not in over]
        self._sat_out = len(staying) < len(decoding)
        return staying

    def served(self, sequence: Sequence, over: Collection[str], budget: int) -> float:
        """The counter of the tenant of a prompt that was begun, as it is ranked. budget: prompt tokens of the step."""
        served = self._fairness.served(sequence)[0]
        if sequence.request.tenant in over or sequence.num_uncomputed > SOON * budget:
            return served
        return served - self._fairness.paid(sequence)
