"""Adapters that change during the run: uploads of new names, replacements of used ones, unloads.

Changes come as a Poisson process and take turns. Names that were uploaded are deleted at the end; names that were
replaced keep their new version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import httpx

from onebase.bench.load.result import Change

Action = Literal["upload", "replace", "unload"]
ACTIONS: tuple[Action, ...] = ("upload", "replace", "unload")
TIMEOUT = 120.0
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class ChurnPlan:
    """rate: changes a second. folder: an adapter that fits the base; with none only unloads are made."""

    rate: float
    folder: Path | None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError("churn: changes a second, above 0")
        if self.folder is not None and not (self.folder / _FILES[0]).is_file():
            raise ValueError(f"churn_folder: {self.folder} has no {_FILES[0]}")

    @property
    def actions(self) -> tuple[Action, ...]:
        return ACTIONS if self.folder is not None else ("unload",)


class Churn:
    """Makes the changes. models: whose adapters are replaced and unloaded. start: of the run."""

    def __init__(self, plan: ChurnPlan, client: httpx.AsyncClient, models: Sequence[str], start: float) -> None:
        self._plan = plan
        self._client = client
        self._models = models
        self._start = start
        self._random = Random(plan.seed)
        self._uploaded: list[str] = []
        self.changes: list[Change] = []

    async def run(self) -> None:
        """Until it is cancelled. A change that takes longer than the gap to the next one delays it."""
        due = self._start
        turn = 0
        while True:
            due += self._random.expovariate(self._plan.rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await self._change(self._plan.actions[turn % len(self._plan.actions)], turn)
            turn += 1

    async def clean(self) -> None:
        """Delete what was uploaded."""
        for name in self._uploaded:
            await self._client.delete(f"/v1/adapters/{name}", timeout=TIMEOUT)

    async def _change(self, action: Action, turn: int) -> None:
        name = f"load-churn-{self._plan.seed}-{turn}" if action == "upload" else self._random.choice(self._models)
        began = time.perf_counter()
        status, error = await self._answer(action, name)
        if action == "upload" and error is None:
            self._uploaded.append(name)
        took = time.perf_counter() - began
        self.changes.append(Change(began - self._start, action, name, took, status, error))

    async def _answer(self, action: Action, name: str) -> tuple[int, str | None]:
        """Status, and what went wrong. 0: there was no answer."""
        try:
            if action == "unload":
                answer = await self._client.post(f"/v1/adapters/{name}/unload", timeout=TIMEOUT)
            else:
                answer = await self._client.post(
                    "/v1/adapters", data={"name": name}, files=self._files(), timeout=TIMEOUT
                )
        except httpx.HTTPError as error:
            return 0, f"{type(error).__name__}: {error}"
        return answer.status_code, None if answer.is_success else answer.text[:500]

    def _files(self) -> list[tuple[str, tuple[str, bytes]]]:
        assert self._plan.folder is not None
        found = [self._plan.folder / name for name in _FILES]
        return [("files", (path.name, path.read_bytes())) for path in found if path.is_file()]
