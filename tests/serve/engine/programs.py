"""Adapters made by hand, in the place of what would be compiled from folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebase.adapters.program import AdapterProgram, SiteOps
from onebase.serve.engine.messages import AdapterUse, Failure

PROMPT = [5, 99, 23, 7, 64, 31]


class Programs:
    """Programs by name, for one engine."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.made: dict[str, AdapterProgram] = {}
        self.compiled: list[str] = []
        driver.engine.adapters.transit.fetcher.compile = self._compile

    def add(self, name: str, ops: Mapping[str, SiteOps], **rest: Any) -> None:
        self.made[name] = AdapterProgram(name, "MADE", ops, **rest)

    def use(self, name: str, scale: float = 1.0) -> AdapterUse:
        return AdapterUse(name, name, scale, f"{name}-as-asked")

    def refusal(self, *uses: AdapterUse) -> Failure:
        request_id = self.driver.submit(PROMPT, *uses, max_tokens=2)
        self.driver.run()
        failure = self.driver.failures[request_id]
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.param) == ("RequestRejected", "adapters")
        return failure

    def _compile(self, path: Path, digest: str) -> AdapterProgram:
        self.compiled.append(digest)
        return self.made[digest]
