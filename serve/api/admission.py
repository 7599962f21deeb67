"""How much work the server takes on: a bound on the sequences in flight and on their prompt tokens."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass

from onebase.serve.api.errors import ApiError, bad_request


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


class Admission:
    """Sequences are reserved before a request is tokenised, its prompt tokens once they are known."""

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        self.sequences = Budget("sequences", "--max-inflight-seqs", max_sequences)
        self.tokens = Budget("prompt tokens", "--max-inflight-tokens", max_tokens)
