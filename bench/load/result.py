"""What a load run stores: every request, the server's gauges over time, and what they amount to. One JSON file.

All times are seconds since the start of the run, on the client's clock. Latencies follow the literature:

    TTFT   first piece with text - sent, which is when the request is written to its connection
    ITL    each gap between pieces with text
    TPOT   (E2E - TTFT) / (tokens out - 1), of requests with at least two tokens
    E2E    last piece - sent
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

NAME = "load"
FORMAT = 1

Status = Literal["ok", "rejected", "failed", "cancelled"]


class ResultError(ValueError):
    """A file that is no result of a load run. The message names the file and the field."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that was offered.

    at: when it was due; sent: when it was written to a connection. adapter: the model that it named. tenant: "" without
    tenants. tokens_in, tokens_out: as the server counted them, else as planned and as pieces came. first, ends: the
    first and the last piece with text; none where none came. gaps: between those pieces, one fewer than they are.
    status: rejected is 429 or 503, failed any other error, cancelled what the client broke off on purpose.
    """

    at: float
    adapter: str
    tenant: str
    tokens_in: int
    tokens_out: int
    sent: float
    first: float | None
    ends: float | None
    gaps: tuple[float, ...]
    status: Status
    error: str | None = None

    def __post_init__(self) -> None:
        if min(self.tokens_in, self.tokens_out) < 0:
            raise ValueError("tokens_in and tokens_out: at least 0")
        if (self.first is None) != (self.ends is None):
            raise ValueError("first and ends: both or neither")
        if self.first is not None and self.ends is not None and not self.sent <= self.first <= self.ends:
            raise ValueError("sent, first and ends: in this order")
        if any(gap < 0 for gap in self.gaps):
            raise ValueError("gaps: at least 0")

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.sent

    @property
    def e2e(self) -> float | None:
        """Of whole answers: one that broke off has none."""
        return None if self.ends is None or self.status != "ok" else self.ends - self.sent

    @property
    def tpot(self) -> float | None:
        if self.first is None or self.ends is None or self.tokens_out < 2:
            return None
        return (self.ends - self.first) / (self.tokens_out - 1)


@dataclass(frozen=True, slots=True)
class Stats:
    """A distribution, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Measures:
    """What requests amount to. attainment: share of those offered that met every SLO; goodput: how many a second did.

    Rejected and failed requests are offered ones that met none. A distribution without values is none.
    """

    offered: int
    ok: int
    rejected: int
    failed: int
    cancelled: int
    tokens_per_second: float
    requests_per_second: float
    goodput: float
    attainment: float
    ttft: Stats | None
    tpot: Stats | None
    itl: Stats | None
    e2e: Stats | None


@dataclass(frozen=True, slots=True)
class Summary(Measures):
    """Over the requests that were due in the window, warm-up and tail cut off.

    window: its ends; tokens and whole answers count by when they came.
    """

    window: tuple[float, float]
    per_adapter: Mapping[str, Measures]
    per_tenant: Mapping[str, Measures]


@dataclass(frozen=True, slots=True)
class ClientReport:
    """The client's own part. lag: how late its event loops woke up; late: how long after they were due requests were
    sent, opening a connection included; cpu: share of a core that its busiest process took. warnings: why its
    latencies are not to be trusted."""

    lag_p99: float
    lag_max: float
    cpu: float
    late_p99: float = 0.0
    late_max: float = 0.0
    processes: int = 1
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerReport:
    """Who answered. version: none where it does not tell."""

    url: str
    model: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of an adapter during the run. action: upload, replace or unload. seconds: until it was answered."""

    at: float
    action: str
    adapter: str
    seconds: float
    status: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A run. workload: all its parameters. timeline: rows of ``t`` and the server's gauges, where it has any."""

    machine: Mapping[str, Any]
    server: ServerReport
    workload: Mapping[str, Any]
    seconds: float
    requests: tuple[RequestRecord, ...]
    timeline: tuple[Mapping[str, float], ...]
    client: ClientReport
    summary: Summary
    churn: tuple[Change, ...] = ()
    benchmark: str = field(default=NAME)
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        if self.benchmark != NAME:
            raise ValueError(f"benchmark: {self.benchmark!r}; only {NAME!r} is read here")
        if self.format != FORMAT:
            raise ValueError(f"format: {self.format}; this version reads {FORMAT}")

    def write(self, path: Path) -> None:
        """As JSON, head first; times to the hundredth of a millisecond."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rest = [item.name for item in fields(self) if item.name not in ("benchmark", "format")]
        shown = {name: getattr(self, name) for name in ("benchmark", "format", *rest)}
        shown["requests"] = [_rounded(record) for record in self.requests]
        path.write_bytes(msgspec.json.encode(shown) + b"\n")


def read(path: Path) -> LoadResult:
    """Raises ResultError for a file that is no such result, and OSError where it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=LoadResult)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ResultError(f"{path}: {error}") from None


def _rounded(record: RequestRecord) -> dict[str, Any]:
    """Rounding keeps the order of times."""
    shown = {item.name: getattr(record, item.name) for item in fields(record)}
    for name in ("at", "sent", "first", "ends"):
        shown[name] = None if shown[name] is None else round(shown[name], 5)
    shown["gaps"] = [round(gap, 5) for gap in record.gaps]
    return shown
