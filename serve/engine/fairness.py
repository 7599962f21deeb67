"""Fair sharing by virtual token counters (Sheng et al. 2024, arXiv:2401.00588), over tenants and then their adapters.

Each tenant has a counter of the tokens it was served, divided by its weight; who has the least among those that want
something is served next. A tenant that comes back lifts its counter to the least of the active ones: what it did not
use while it was away is not owed to it. So tenants that all wait for service differ by no more than one request's or a
few steps' tokens, whatever each of them sends (their theorem 4.4; a prompt that two steps will end keeps its turn).

The adapters of a tenant have counters of the same kind among themselves, which decide only between its own requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from onebase.serve.engine.sequence import Sequence

INPUT_WEIGHT = 1.0  # of a token of the prompt that was computed; those that the prefix cache gave are free
OUTPUT_WEIGHT = 2.0  # of a generated token, as in the paper


@dataclass(slots=True)
class Account:
    """served: virtual tokens so far. sequences: how many wait or run. parts: of a tenant, by set of adapters."""

    served: float = 0.0
    sequences: int = 0
    parts: dict[tuple[str, ...], Account] = field(default_factory=dict)


class Fairness:
    """The counters. A sequence is in from its arrival to its end, whether it waits or runs."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """weights: of tenants, more than 0; 1 for those that are not named."""
        self._weights = dict(weights or {})
        self._accounts: dict[str, Account] = {}
        self._active: dict[str, Account] = {}
        self._books: dict[Sequence, tuple[Account, Account, float]] = {}  # tenant's, its adapters', weight
        self._active_weight = 0.0
        self._left_at = 0.0  # the counter of the tenant that was last to leave

    @property
    def active(self) -> Collection[str]:
        """Tenants with sequences that wait or run."""
        return self._active.keys()

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def entitlement(self, tenant: str) -> float:
        """The share that a tenant has of everything while those run or wait that do now; 0 < share <= 1."""
        weight = self.weight(tenant)
        return weight / (self._active_weight + (0.0 if tenant in self._active else weight))

    def served(self, sequence: Sequence) -> tuple[float, float]:
        """Counters of its tenant, and among the tenant's of its adapters: the least goes first."""
        account = self._active[sequence.request.tenant]
        return account.served, account.parts[sequence.digests].served

    def enter(self, sequence: Sequence) -> None:
        """It has arrived."""
        tenant = sequence.request.tenant
        account = self._accounts.setdefault(tenant, Account())
        if tenant not in self._active:
            account.served = max(account.served, _least(self._active.values(), self._left_at))
            self._active[tenant] = account
            self._active_weight = sum(map(self.weight, self._active))
        part = account.parts.get(sequence.digests)
        if part is None:
            part = account.parts[sequence.digests] = Account(_least(account.parts.values(), 0.0))
        account.sequences += 1
        part.sequences += 1
        self._books[sequence] = account, part, self.weight(tenant)

    def leave(self, sequence: Sequence) -> None:
        """It has ended. A tenant's debt is kept while it is away; between its own adapters there is none to keep."""
        tenant = sequence.request.tenant
        account, part, _ = self._books.pop(sequence)
        account.sequences -= 1
        part.sequences -= 1
        if not part.sequences:
            del account.parts[sequence.digests]
        if not account.sequences:
            del self._active[tenant]
            self._active_weight = sum(map(self.weight, self._active))
            self._left_at = account.served

    def charge(self, sequence: Sequence, inputs: int, outputs: int) -> None:
        """It is served so many tokens of its prompt, and new ones; negative where they are taken back."""
        account, part, weight = self._books[sequence]
        cost = (INPUT_WEIGHT * inputs + OUTPUT_WEIGHT * outputs) / weight
        account.served += cost
        part.served += cost

    def paid(self, sequence: Sequence) -> float:
        """What its tenant was charged for its prompt so far."""
        return INPUT_WEIGHT * sequence.num_paid / self._books[sequence][2]

    def check(self, sequences: Collection[Sequence]) -> None:
        """Prove that the accounts count these sequences. Raises RuntimeError where they do not."""
        counted: dict[tuple[str, tuple[str, ...]], int] = {}
        for sequence in sequences:
            key = sequence.request.tenant, sequence.digests
            counted[key] = counted.get(key, 0) + 1
        known = {(name, use): part.sequences for name, one in self._active.items() for use, part in one.parts.items()}
        totals = sum(account.sequences for account in self._active.values())
        if known != counted or not totals == len(sequences) == len(self._books):
            raise RuntimeError(f"fairness: {len(sequences)} sequences wait or run, accounts count {totals}")


def _least(accounts: Collection[Account], otherwise: float) -> float:
    return min((account.served for account in accounts), default=otherwise)
