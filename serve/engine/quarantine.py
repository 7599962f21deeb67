"""Keeps a request that kills the engine from killing it for ever.

Requests in flight at a crash fail with 503, and clients send them again. One whose content was present at several
crashes in a row is refused; finishing once clears it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.messages import Request

MOST_CRASHES = 3
_REMEMBERED = 4096


def content_key(request: Request) -> bytes:
    """Digest of what the request asks for, whatever its id and seed."""
    adapters = [(use.digest, use.scale) for use in request.adapters]
    return hashlib.sha256(repr((request.prompt, adapters)).encode()).digest()


class Quarantine:
    """Counts crashes by request content."""

    def __init__(self) -> None:
        self._crashes: OrderedDict[bytes, int] = OrderedDict()

    def check(self, request: Request) -> None:
        """Raises RequestRejected for a request that was present at too many crashes."""
        if self._crashes and self._crashes.get(content_key(request), 0) >= MOST_CRASHES:
            raise RequestRejected(
                f"the engine died {MOST_CRASHES} times while it served this very request; it is not tried again"
            )

    def crashed(self, in_flight: Iterable[Request]) -> None:
        for key in {content_key(request) for request in in_flight}:
            self._crashes[key] = self._crashes.pop(key, 0) + 1
        while len(self._crashes) > _REMEMBERED:
            self._crashes.popitem(last=False)

    def finished(self, request: Request) -> None:
        if self._crashes:
            self._crashes.pop(content_key(request), None)
