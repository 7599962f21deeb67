"""Service level objectives: what a request's latencies may be at most."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from onebase.bench.load.result import RequestRecord

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}
_LIMIT = re.compile(r"(?P<name>[a-z0-9]+)=(?P<value>[0-9]+(?:\.[0-9]+)?)(?P<unit>us|ms|s|)")


@dataclass(frozen=True, slots=True)
class Slo:
    """In seconds; none: no limit. itl is held against a request's longest gap."""

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """``ttft=6s,tpot=100ms``; without a unit seconds. Raises ValueError."""
        allowed = [item.name for item in fields(cls)]
        limits: dict[str, float] = {}
        for part in filter(None, map(str.strip, text.split(","))):
            found = _LIMIT.fullmatch(part)
            if found is None or found["name"] not in allowed or found["name"] in limits:
                raise ValueError(f"slo: {part!r}; allowed is NAME=NUMBER[us|ms|s], once each of {', '.join(allowed)}")
            limits[found["name"]] = float(found["value"]) * _UNITS[found["unit"]]
        return cls(**limits)

    def met(self, record: RequestRecord) -> bool:
        """By an answer that is whole, or that the client broke off: then by what came of it."""
        if record.status not in ("ok", "cancelled"):
            return False
        if record.first is None:
            return record.status == "ok" and self == Slo()  # an answer without text
        limits = (
            (self.ttft, record.ttft),
            (self.tpot, record.tpot),
            (self.itl, max(record.gaps, default=None)),
            (self.e2e, record.e2e),
        )
        return all(_least(value) <= _most(limit) for limit, value in limits)


def _least(value: float | None) -> float:
    return 0.0 if value is None else value


def _most(limit: float | None) -> float:
    return math.inf if limit is None else limit
