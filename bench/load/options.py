"""All that a run is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onebase.bench.load.churn import ChurnPlan
from onebase.bench.load.requests import Endpoint
from onebase.bench.load.slo import Slo
from onebase.bench.load.tenants import Sender
from onebase.bench.load.workload import Workload


@dataclass(frozen=True, slots=True)
class Options:
    """model: the base, or what to ask for in place of adapters. adapters: how many of those the server names; none:
    all. names: adapters by name instead. vocabulary: prompts are ids below it; 0: words; none: as the server tells.

    key: of the requests, where senders have none, and of questions to the server; admin_key: of changes to adapters.
    warm_up, tail: seconds at the run's ends that are not measured. scrape: seconds between looks at /metrics.
    """

    url: str
    workload: Workload
    model: str | None = None
    adapters: int | None = None
    names: tuple[str, ...] = ()
    endpoint: Endpoint = "completions"
    vocabulary: int | None = None
    ignore_eos: bool = True
    senders: tuple[Sender, ...] = (Sender(),)
    key: str = ""
    admin_key: str = ""
    slo: Slo = field(default_factory=Slo)
    warm_up: float = 0.0
    tail: float = 0.0
    processes: int = 1
    timeout: float = 600.0
    trace: Path | None = None
    churn: ChurnPlan | None = None
    scrape: float = 1.0

    def __post_init__(self) -> None:
        if self.endpoint not in ("completions", "chat"):
            raise ValueError("endpoint: completions or chat")
        if min(self.warm_up, self.tail) < 0 or min(self.timeout, self.scrape) <= 0 or self.processes < 1:
            raise ValueError("warm_up, tail: at least 0; timeout, scrape: above 0; processes: at least 1")

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sender.key or self.key for sender in self.senders)

    def parameters(self, models: int) -> dict[str, Any]:
        """What is stored of them: no keys."""
        churn = self.churn and {"rate": self.churn.rate, "actions": self.churn.actions}
        return asdict(self.workload) | {
            "models": models,
            "endpoint": self.endpoint,
            "ignore_eos": self.ignore_eos,
            "tenants": {sender.name: sender.share for sender in self.senders},
            "slo": {name: limit for name, limit in asdict(self.slo).items() if limit is not None},
            "warm_up": self.warm_up,
            "tail": self.tail,
            "processes": self.processes,
            "timeout": self.timeout,
            "trace": None if self.trace is None else self.trace.name,
            "churn": churn,
        }
