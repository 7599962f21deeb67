"""The names of what the engine has to do with: what an alias means stays, and so does what a request has just named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onebase.serve.api import live_names

from .fake_sources import Bench, FakeSources, importing


@pytest.fixture
def bench(tmp_path: Path, engine: Any) -> Callable[[], Any]:
    return lambda: importing(tmp_path / "data", engine, FakeSources({}))


async def idle(b: Bench) -> None:
    async with asyncio.timeout(10):
        while b.store._tasks:
            await asyncio.sleep(0.001)


def test_what_the_alias_of_another_name_means_stays(run: Any, bench: Any, engine: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with bench() as b:
            folder = adapter_folder("x", 1)
            old = await b.store.add_folder("b", folder, source="upload")
            await b.store.change("b", pinned=None, labels={}, aliases={"stable": 1}, dropped=())
            await b.store.add_folder("b", adapter_folder("y", 2), source="upload")
            await b.store.add_folder("a", folder, source="upload")
            await b.store.add_folder("a", adapter_folder("z", 3), source="upload")
            await idle(b)
            assert old.digest in engine.stats.resident
            await b.store.change("b", pinned=None, labels={}, aliases={}, dropped=("stable",))
            await b.store.rollback("a", 1)
            await b.store.rollback("a", 2)
            await idle(b)
            assert old.digest not in engine.stats.resident

    run(body())


def test_what_a_request_has_just_named_is_not_forgotten(
    run: Any, bench: Any, engine: Any, adapter_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's statistics know of it only later."""
    monkeypatch.setattr(live_names, "_FEW", 1)

    async def body() -> None:
        async with bench() as b:
            entries = [
                await b.store.add_folder(name, adapter_folder(name, seed), source="upload")
                for seed, name in enumerate("abcd")
            ]
        engine.stats = replace(engine.stats, resident={})
        async with bench() as b, AsyncExitStack() as held:
            async with AsyncExitStack() as short:
                await b.store.hold("c", short)
            for name in "abd":
                await b.store.hold(name, held)
            named = {entries[index].digest: (name,) for index, name in ((0, "a"), (1, "b"), (3, "d"))}
            assert dict(b.store.names) == named

    run(body())
