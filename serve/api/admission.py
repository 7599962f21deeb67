"""How much work the server takes on: a bound on the sequences in flight and on their prompt tokens."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from onebase.serve.api.errors import ApiError, bad_request
from onebase.serve.tenants import Tenant


@dataclass(slots=True)
class Budget:
    """A count of what requests in flight have taken, never over ``limit``. Used from the event loop alone.

    what: the noun of the messages; option: the command line's name for the limit.
    """

    what: str
    option: str
    limit: int
    taken: int = 0

    def take(self, amount: int, until: AsyncExitStack, param: str) -> None:
        """Reserves until the stack closes.

        Raises ApiError 429 where it does not fit beside what is taken, and 400 where it would not fit alone.
        """
        if amount > self.limit:
            raise bad_request(
                f"The request has {amount} {self.what}; the server takes at most {self.limit} ({self.option}).", param
            )
        if self.taken + amount > self.limit:
            raise ApiError(
                429,
                f"The server is full: {self.taken} {self.what} are in flight, this request has {amount}, and the "
                f"limit is {self.limit} ({self.option}). Try again later.",
                code="overloaded",
            )
        self.taken += amount
        until.callback(self._give, amount)

    def _give(self, amount: int) -> None:
        self.taken -= amount


class Nested:
    """Budgets of which a request takes the same amount: its tenant's own before the server's."""

    def __init__(self, *budgets: Budget) -> None:
        self._budgets = budgets

    def take(self, amount: int, until: AsyncExitStack, param: str) -> None:
        """See Budget.take. What one of them gave stays taken until the stack closes, whatever the next one says."""
        for budget in self._budgets:
            budget.take(amount, until, param)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Sequences are reserved before a request is tokenised, its prompt tokens once they are known."""

    sequences: Nested
    tokens: Nested


class Admission:
    """The server's budgets, and those of tenants that have limits of their own."""

    def __init__(self, max_sequences: int, max_tokens: int, tenants: Iterable[Tenant] = ()) -> None:
        self.sequences = Budget("sequences", "--max-inflight-seqs", max_sequences)
        self.tokens = Budget("prompt tokens", "--max-inflight-tokens", max_tokens)
        self._shared = Reservation(Nested(self.sequences), Nested(self.tokens))
        self._own = {tenant.name: self._of(tenant) for tenant in tenants}

    def of(self, tenant: Tenant) -> Reservation:
        return self._own.get(tenant.name, self._shared)

    def _of(self, tenant: Tenant) -> Reservation:
        seqs, tokens = tenant.max_inflight_seqs, tenant.max_inflight_tokens
        own = f"of the tenant {tenant.name}"
        sequences = [] if seqs is None else [Budget("sequences", f"max_inflight_seqs {own}", seqs)]
        prompts = [] if tokens is None else [Budget("prompt tokens", f"max_inflight_tokens {own}", tokens)]
        return Reservation(Nested(*sequences, self.sequences), Nested(*prompts, self.tokens))
