"""Who is preempted: for pages that a running sequence needs, and for a waiting one that has more of a claim.

Youngest first, of the least urgent priority, of the tenant that is furthest above its share. A sequence that was
preempted ``MOST_PREEMPTIONS`` times gives way to nobody but another such one that is older; so the oldest of them runs
to its end, and none is preempted for ever.

A waiting sequence has a claim on the seat and the pages of one that is less urgent; or, while its tenant is under its
share, of one whose tenant stays at or above its own share without it, and was served more. Neither can claim back what
it gave: the one is at most at its share then, the other at least. What a tenant has is the larger one of its parts of
seats and of pages (dominant resource fairness, Ghodsi et al., NSDI 2011).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from onebase.serve.engine.fairness import Fairness
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.sequence import Sequence

MOST_PREEMPTIONS = 3  # of one sequence, before it is spared


@dataclass(slots=True)
class _Holding:
    """What a tenant has."""

    seats: int = 0
    pages: int = 0


class Victims:
    """Looks at the running sequences, and changes nothing."""

    def __init__(self, fairness: Fairness, pages: PageAllocator, max_num_seqs: int) -> None:
        self._fairness = fairness
        self._pages = pages
        self._max_num_seqs = max_num_seqs

    def for_growth(self, running: Rows[Sequence]) -> Sequence:
        """Who gives its pages to one that runs; it may be that one itself."""
        holdings = self._holdings(running)
        return max(running, key=lambda one: (one.preemptions < MOST_PREEMPTIONS, *self._excess(one, holdings)))

    def for_start(self, sequence: Sequence, num_pages: int, running: Rows[Sequence]) -> Sequence | None:
        """Who gives way to one that waits and needs so many pages; None where it has no claim."""
        holdings = self._holdings(running)
        is_due = self._is_due(sequence.request.tenant, num_pages, holdings)
        may_go = [
            one
            for one in running
            if one.preemptions < MOST_PREEMPTIONS and self._has_claim(sequence, one, holdings, is_due=is_due)
        ]
        return max(may_go, key=lambda one: self._excess(one, holdings), default=None)

    def claimants(self, tenants: Iterable[str], running: Collection[Sequence]) -> set[str]:
        """Which of these tenants may have a claim on somebody's seat."""
        holdings = self._holdings(running)
        return {tenant for tenant in tenants if self._is_due(tenant, 0, holdings)}

    def _has_claim(self, sequence: Sequence, on: Sequence, holdings: dict[str, _Holding], *, is_due: bool) -> bool:
        urgency = sequence.request.priority - on.request.priority
        if urgency or not is_due or sequence.request.tenant == on.request.tenant:
            return urgency < 0
        if self._fairness.served(sequence)[0] > self._fairness.served(on)[0]:
            return False
        other, tenant = holdings[on.request.tenant], on.request.tenant
        return self._share(other.seats - 1, other.pages - len(on.pages)) >= self._fairness.entitlement(tenant)

    def _is_due(self, tenant: str, num_pages: int, holdings: dict[str, _Holding]) -> bool:
        """Whether the tenant stays within its share with one sequence more; the first one always is due."""
        held = holdings.get(tenant)
        if held is None:
            return True
        return self._share(held.seats + 1, held.pages + num_pages) <= self._fairness.entitlement(tenant)

    def _excess(self, sequence: Sequence, holdings: dict[str, _Holding]) -> tuple[int, float, int]:
        held, request = holdings[sequence.request.tenant], sequence.request
        share = self._share(held.seats, held.pages) / self._fairness.weight(request.tenant) if len(holdings) > 1 else 0
        return request.priority, share, sequence.order

    def _share(self, seats: int, pages: int) -> float:
        return max(seats / self._max_num_seqs, pages / self._pages.num_pages)

    @staticmethod
    def _holdings(running: Iterable[Sequence]) -> dict[str, _Holding]:
        holdings: dict[str, _Holding] = {}
        for sequence in running:
            held = holdings.setdefault(sequence.request.tenant, _Holding())
            held.seats += 1
            held.pages += len(sequence.pages)
        return holdings
