"""Imports in the background: joined, refused, failed, resumed. And what the resolver finds, once for all who ask."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import AdapterConflict, AdapterNotFound, AdapterRejected, EngineDead, SourceFailed
from onebase.adapters.registry import AdapterState
from onebase.serve.api import fetching, lookups
from onebase.serve.api.errors import ApiError
from onebase.serve.api.lookups import Misses

from .fake_sources import Bench, FakeSources, importing

Open = Callable[..., AbstractAsyncContextManager[Bench]]


@pytest.fixture
def sources(adapter_folder: Any) -> FakeSources:
    return FakeSources({"one": adapter_folder("one", 1), "two": adapter_folder("two", 2), "at/x": adapter_folder("x")})


@pytest.fixture
def bench(tmp_path: Path, engine: Any, sources: FakeSources) -> Open:
    def make(other: FakeSources | None = None) -> AbstractAsyncContextManager[Bench]:
        return importing(tmp_path / "data", engine, other or sources)

    return make


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_import_goes_through_its_states(run: Any, bench: Open, sources: FakeSources, engine: Any) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.gate.clear()
            job = await b.importer.start("a", "one", "main", "me")
            assert (job.state, job.name, job.source, job.by) == (AdapterState.FETCHING, "a", "one", "me")
            assert await b.importer.start("a", "one", "main", "you") == job
            with pytest.raises(AdapterConflict):
                await b.importer.start("a", "two", None, "you")
            with pytest.raises(AdapterNotFound):
                await b.store.get("a")
            sources.gate.set()
            entry = await b.importer.wait(job.id)
            assert (entry.name, entry.source, entry.revision, entry.created_by) == ("a", "one", "main", "me")
            done = b.registry.last_import("a")
            assert done is not None
            assert (done.state, done.version, done.id) == (AdapterState.READY, 1, job.id)
            assert (await b.importer.wait(job.id)).version == 1
            assert sources.fetched == ["one"]
            again = await b.importer.start("a", "two", None, "me")
            assert (await b.importer.wait(again.id)).version == 2

    run(body())


def test_what_could_never_be_fetched_starts_nothing(run: Any, bench: Open) -> None:
    async def body() -> None:
        async with bench() as b:
            with pytest.raises(AdapterRejected):
                await b.importer.start("a", "bad:x", None, "")
            with pytest.raises(AdapterConflict, match="base"):
                await b.importer.start("base", "one", None, "")
            with pytest.raises(AdapterNotFound, match="no import"):
                await b.importer.wait("nope")
            assert b.registry.imports() == ()

    run(body())


@pytest.mark.parametrize("at", ["source", "engine"])
def test_a_failure_is_recorded_and_told(at: str, run: Any, bench: Open, sources: FakeSources, engine: Any) -> None:
    async def body() -> None:
        async with bench() as b:
            error: Exception = SourceFailed("it is down") if at == "source" else EngineDead("it is dead")
            if at == "source":
                sources.failures["one"] = error
            else:
                engine.load_failure = error
            job = await b.importer.start("a", "one", None, "")
            with pytest.raises(type(error)):
                await b.importer.wait(job.id)
            done = b.registry.last_import("a")
            assert done is not None
            assert (done.state, done.version) == (AdapterState.FAILED, None)
            assert done.reason in {"it is down", "it is dead"}
            with pytest.raises(AdapterRejected, match=done.reason):
                await b.importer.wait(job.id)
            engine.load_failure = None
            sources.failures.clear()
            assert (await b.importer.wait((await b.importer.start("a", "two", None, "")).id)).version == 1

    run(body())


def test_defects_fail_the_import_and_say_nothing_of_themselves(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.failures["one"] = ZeroDivisionError("secret")
            job = await b.importer.start("a", "one", None, "")
            with pytest.raises(ZeroDivisionError):
                await b.importer.wait(job.id)
            with pytest.raises(AdapterRejected, match="Internal error") as told:
                await b.importer.wait(job.id)
            assert "secret" not in told.value.message

    run(body())


def test_whoever_leaves_cancels_nothing(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.gate.clear()
            job = await b.importer.start("a", "one", None, "")
            waiter = asyncio.create_task(b.importer.wait(job.id))
            await asyncio.sleep(0.02)
            waiter.cancel()
            await asyncio.gather(waiter, return_exceptions=True)
            sources.gate.set()
            assert (await b.importer.wait(job.id)).version == 1

    run(body())


def test_a_few_are_fetched_at_once(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.gate.clear()
            jobs = [await b.importer.start(f"a{index}", "one", None, "") for index in range(12)]
            await until(lambda: sources.at_once == fetching.FETCHES)
            await asyncio.sleep(0.05)
            sources.gate.set()
            await asyncio.gather(*(b.importer.wait(job.id) for job in jobs))
            assert sources.most_at_once == fetching.FETCHES

    run(body())


def test_a_restart_goes_on_with_what_was_under_way(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        sources.gate.clear()
        async with bench() as b:
            job = await b.importer.start("a", "one", "v1", "me")
            await until(lambda: sources.at_once == 1)
        assert sources.stopped.is_set()
        after = FakeSources(sources.folders)
        async with bench(after) as b:
            assert [left.state for left in b.registry.imports(unfinished=True)] == [AdapterState.FETCHING]
            await b.importer.resume()
            entry = await b.importer.wait(job.id)
            assert (entry.version, entry.revision, entry.created_by) == (1, "v1", "me")
            assert b.registry.imports(unfinished=True) == ()

    run(body())


def test_an_import_that_ends_as_another_joins_runs_once(
    run: Any, bench: Open, sources: FakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.gate.clear()
            job = await b.importer.start("a", "one", None, "")
            real = b.registry.begin_import

            def begin(*arguments: Any) -> Any:
                """The import ends between the answer of the registry and whoever asked it."""
                joined = real(*arguments)
                sources.gate.set()
                while not b.registry.imports()[0].state.finished:
                    time.sleep(0.005)
                time.sleep(0.05)
                return joined

            monkeypatch.setattr(b.registry, "begin_import", begin)
            assert await b.importer.start("a", "one", None, "") == job
            assert (await b.importer.wait(job.id)).version == 1
            await until(lambda: not b.importer._tasks)
            assert sources.fetched == ["one"]
            assert dict(b.store.import_states.current) == {}

    run(body())


def test_a_name_deleted_and_imported_anew(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.gate.clear()
            first = await b.importer.start("a", "one", None, "")
            await until(lambda: sources.at_once == 1)
            await b.store.delete("a")
            second = await b.importer.start("a", "two", None, "")
            ended = asyncio.create_task(b.importer.wait(first.id))
            sources.gate.set()
            assert (await b.importer.wait(second.id)).source == "two"
            with pytest.raises(AdapterConflict, match="deleted already"):
                await ended
            assert [entry.source for entry in b.registry.versions("a")] == ["two"]
            with pytest.raises(AdapterNotFound, match="no import"):
                await b.importer.wait(first.id)
            assert dict(b.store.import_states.current) == {}

    run(body())


def test_what_waits_for_its_turn_and_is_deleted_is_never_fetched(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        async with bench() as b:
            sources.gate.clear()
            for index in range(fetching.FETCHES):
                await b.importer.start(f"a{index}", "one", None, "")
            last = await b.importer.start("b", "two", None, "")
            await b.store.delete("b")
            ended = asyncio.create_task(b.importer.wait(last.id))
            await until(lambda: sources.at_once == fetching.FETCHES)
            sources.gate.set()
            with pytest.raises(AdapterConflict, match="deleted already"):
                await ended
            assert "two" not in sources.fetched

    run(body())


def test_a_fetch_ends_when_its_import_is_deleted(
    run: Any, bench: Open, sources: FakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the next piece of a source that never comes to an end."""
    written = threading.Event()

    def endless(source: str, revision: str | None, stage: Any) -> Any:
        with stage.open("adapter_config.json") as file:
            while not sources.stopped.is_set():
                file.write(b"")
                written.set()
                time.sleep(0.001)

    monkeypatch.setattr(fetching, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sources, "_fetch", endless)

    async def body() -> None:
        async with bench() as b:
            job = await b.importer.start("a", "one", None, "")
            ended = asyncio.create_task(b.importer.wait(job.id))
            await until(written.is_set)
            await b.store.delete("a")
            with pytest.raises(AdapterConflict, match="deleted already"):
                await ended
            assert sources.at_once == 0

    run(body())


def test_a_fetch_that_hangs_does_not_hold_up_the_end(
    run: Any, bench: Open, sources: FakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_ENDING_SECONDS", 0.1)
    monkeypatch.setattr(sources, "close", lambda: None)  # as a read that notices nothing

    async def body() -> None:
        sources.gate.clear()
        async with bench() as b:
            await b.importer.start("a", "one", None, "")
            await until(lambda: sources.at_once == 1)
            start = time.monotonic()
        assert time.monotonic() - start < 2
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "import")
        sources.stopped.set()
        await until(lambda: sources.at_once == 0)

    run(body())


def test_one_lookup_for_all_who_ask(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        sources.resolver = "at/{name}"
        async with bench() as b:
            sources.gate.clear()
            asking = [asyncio.create_task(b.importer.resolve("x")) for _ in range(20)]
            await until(lambda: sources.at_once == 1)
            asking.pop().cancel()
            sources.gate.set()
            found = await asyncio.gather(*asking)
            assert {(entry.name, entry.version, entry.source, entry.created_by) for entry in found if entry} == {
                ("x", 1, "at/x", "resolver")
            }
            assert sources.fetched == ["at/x"]
            assert b.registry.imports() == ()

    run(body())


def test_what_is_not_there_is_not_asked_for_again_so_soon(
    run: Any, bench: Open, sources: FakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        sources.resolver = "at/{name}"
        sources.failures["at/broken"] = AdapterRejected("no config", param="source")
        sources.failures["at/down"] = SourceFailed("it is down", param="source")
        async with bench() as b:
            for _ in range(3):
                assert await b.importer.resolve("y") is None
                with pytest.raises(AdapterRejected, match="no config") as refusal:
                    await b.importer.resolve("broken")
                assert refusal.value.param == "model"
                with pytest.raises(SourceFailed, match="it is down"):
                    await b.importer.resolve("down")
            assert sorted(sources.fetched) == ["at/broken", "at/down", "at/y"]

    run(body())


def test_names_that_are_none_are_not_looked_up(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        async with bench() as b:
            assert await b.importer.resolve("x") is None  # no resolver
            sources.resolver = "at/{name}"
            for name in ("../x", "x@1", "x/y", "", "x" * 129, "x,y", "base"):
                assert await b.importer.resolve(name) is None
            sources.resolver = "bad:{name}"
            assert await b.importer.resolve("x") is None
            assert sources.fetched == []

    run(body())


def test_a_flood_of_names_is_bounded(
    run: Any, bench: Open, sources: FakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "MAX_LOOKUPS", 8)

    async def body() -> None:
        sources.resolver = "at/{name}"
        async with bench() as b:
            sources.gate.clear()
            asking = [asyncio.create_task(b.importer.resolve(f"n{index}")) for index in range(50)]
            await until(lambda: sources.at_once == fetching.FETCHES)
            sources.gate.set()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, ApiError)]
            assert (len(refused), answers.count(None)) == (42, 8)
            assert {(answer.status, answer.code) for answer in refused} == {(429, "overloaded")}
            assert sources.most_at_once == fetching.FETCHES
            assert len(sources.fetched) == 8

    run(body())


def test_misses_are_few_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("onebase.serve.api.lookups.time.monotonic", lambda: now[0])
    misses = Misses(most=3)
    for name in "abcd":
        misses.add(name, None, 10.0)
    assert len(misses) == 3
    assert [misses.get(name) is None for name in "abcd"] == [True, False, False, False]
    now[0] = 10.0
    assert all(misses.get(name) is None for name in "abcd")
    assert len(misses) == 0


def test_a_name_that_came_meanwhile_is_not_fetched(run: Any, bench: Open, sources: FakeSources) -> None:
    async def body() -> None:
        sources.resolver = "at/{name}"
        async with bench() as b:
            job = await b.importer.start("x", "two", None, "me")
            await b.importer.wait(job.id)
            entry = await b.importer.resolve("x")
            assert entry is not None
            assert (entry.source, entry.version) == ("two", 1)

    run(body())


def test_an_unknown_model_is_served_by_way_of_the_resolver(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        root = adapter_folder("x").parent
        (root / "empty").mkdir()
        async with open_site(allow_path=(root,), resolver=f"{root}/{{name}}") as site:
            answers = await asyncio.gather(*(site.complete(model="x") for _ in range(8)))
            assert {answer.status_code for answer in answers} == {200}
            card = (await site.http.get("/v1/adapters/x")).json()
            assert (card["version"], card["source"]) == (1, f"{root}/x")
            for name in ("y", "x@2", "../x", "a/b"):
                answer = await site.complete(model=name)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
            broken = (await site.complete(model="empty")).json()["error"]
            assert (broken["code"], broken["param"]) == ("adapter_rejected", "model")
            assert (await site.http.get("/v1/models/z")).status_code == 404

    run(body())
