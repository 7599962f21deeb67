"""The watched folder: what appears, changes, breaks and goes, also while nobody looked; and what is not its own."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from onebase.adapters.errors import AdapterNotFound, EngineDead, StorageFailed
from onebase.serve.api import watching
from onebase.serve.api.watching import Watcher

from .fake_sources import Bench, FakeSources, importing


@pytest.fixture
def root(adapter_folder: Callable[..., Path]) -> Path:
    return adapter_folder("a", 1).parent


@pytest.fixture
def bench(tmp_path: Path, engine: Any) -> Callable[[], Any]:
    return lambda: importing(tmp_path / "data", engine, FakeSources({}))


def watch(b: Bench, root: Path) -> Watcher:
    """One that takes for gone what two looks miss."""
    return Watcher(b.store, root, patience=0.0)


async def settle(watcher: Watcher) -> None:
    """Two looks see the same, and the second acts."""
    await watcher.step()
    await watcher.step()


def versions(b: Bench, name: str) -> list[tuple[int, str]]:
    try:
        return [(entry.version, entry.source) for entry in b.registry.versions(name)]
    except AdapterNotFound:
        return []


def test_appears_changes_goes(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        adapter_folder("stays", 9)
        async with bench() as b:
            watcher = watch(b, root)
            await watcher.step()
            assert versions(b, "a") == []
            await watcher.step()
            source = f"watch:{root / 'a'}"
            assert versions(b, "a") == [(1, source)]
            await settle(watcher)
            assert versions(b, "a") == [(1, source)]
            shutil.rmtree(root / "a")
            adapter_folder("a", 2)
            await settle(watcher)
            assert versions(b, "a") == [(1, source), (2, source)]
            shutil.rmtree(root / "a")
            await settle(watcher)
            with pytest.raises(AdapterNotFound):
                await b.store.get("a")
            adapter_folder("a", 2)
            await settle(watcher)
            assert versions(b, "a") == [(3, source)]

    run(body())


def test_a_folder_that_goes_back_to_what_it_was(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            shutil.copytree(root / "a", root / ".kept")  # copies the mtimes too
            shutil.rmtree(root / "a")
            adapter_folder("a", 2)
            await settle(watcher)
            shutil.rmtree(root / "a")
            shutil.copytree(root / ".kept", root / "a")
            await settle(watcher)
            one, two, three = b.registry.versions("a")
            assert one.digest == three.digest != two.digest
            assert (await b.store.get("a")).version == 3

    run(body())


def test_a_restart_changes_nothing_and_reads_no_files(
    run: Any, bench: Any, root: Path, adapter_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            shutil.rmtree(root / "a")
            adapter_folder("a", 2)
            await settle(watcher)
            await b.store.rollback("a", 1)
        monkeypatch.setattr(watching, "copy_folder", None)
        async with bench() as b:
            await settle(watch(b, root))
            assert len(versions(b, "a")) == 2
            assert (await b.store.get("a")).version == 1

    run(body())


def test_what_went_and_changed_while_nobody_looked(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        adapter_folder("b", 2)
        async with bench() as b:
            await settle(watch(b, root))
        shutil.rmtree(root / "a")
        shutil.rmtree(root / "b")
        adapter_folder("b", 3)
        async with bench() as b:
            await settle(watch(b, root))
            assert versions(b, "a") == []
            assert [version for version, _ in versions(b, "b")] == [1, 2]

    run(body())


def test_names_of_others_are_left_alone(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        other = adapter_folder("elsewhere", 7)
        adapter_folder("stays", 9)
        async with bench() as b:
            other = other.rename(root.parent / "elsewhere")
            await b.store.add_folder("a", other, source="upload")
            await b.store.add_folder("c", other, source="upload")
            watcher = watch(b, root)
            await settle(watcher)
            assert versions(b, "a") == [(1, "upload")]
            shutil.rmtree(root / "a")
            await settle(watcher)
            assert versions(b, "a") == [(1, "upload")]
            assert versions(b, "c") == [(1, "upload")]

    run(body())


def test_an_upload_over_a_watched_name_takes_it_over(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        adapter_folder("stays", 9)
        other = adapter_folder("elsewhere", 7)
        async with bench() as b:
            other = other.rename(root.parent / "elsewhere")
            watcher = watch(b, root)
            await settle(watcher)
            await b.store.add_folder("a", other, source="upload")
            shutil.rmtree(root / "a")
            await settle(watcher)
            assert [source for _, source in versions(b, "a")] == [f"watch:{root / 'a'}", "upload"]

    run(body())


def test_a_broken_folder_stops_nothing_and_is_tried_again_when_it_changes(
    run: Any, bench: Any, root: Path, adapter_folder: Any
) -> None:
    async def body() -> None:
        config = adapter_folder("broken", 2) / "adapter_config.json"
        good = config.read_text()
        config.write_text("{")
        adapter_folder("base", 3)
        adapter_folder("z", 4)
        (root / "a" / "link").symlink_to("/etc/passwd")
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            assert [entry.name for entry in b.registry.list().entries] == ["z"]
            (root / "a" / "link").unlink()
            config.write_text(good)
            await settle(watcher)
            assert [entry.name for entry in b.registry.list().entries] == ["a", "broken", "z"]
            config.write_text("[]")
            await settle(watcher)
            assert len(versions(b, "broken")) == 1  # served as it was

    run(body())


def test_what_the_engine_could_not_take_is_tried_again(
    run: Any, bench: Any, root: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            engine.load_failure = EngineDead("it is dead")
            await settle(watcher)
            engine.load_failure = None
            await settle(watcher)
            assert versions(b, "a") == []
            monkeypatch.setattr(watching, "RETRY_SECONDS", 0.0)
            watcher._retries = dict.fromkeys(watcher._retries, 0.0)
            await settle(watcher)
            assert len(versions(b, "a")) == 1

    run(body())


def test_a_folder_that_changes_while_it_is_copied_is_not_taken(
    run: Any, bench: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = root / "a" / "adapter_config.json"
    real = watching.copy_folder

    def copy(source: Path, stage: Any) -> None:
        real(source, stage)
        monkeypatch.setattr(watching, "copy_folder", real)
        os.utime(config, (5, 5))

    monkeypatch.setattr(watching, "copy_folder", copy)

    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            assert versions(b, "a") == []
            await settle(watcher)
            assert len(versions(b, "a")) == 1

    run(body())


def test_a_root_that_went_takes_nothing_with_it(run: Any, bench: Any, root: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            shutil.move(root, root.parent / "unmounted")
            await settle(watcher)
            assert len(versions(b, "a")) == 1
            shutil.move(root.parent / "unmounted", root)
            await settle(watcher)
            assert len(versions(b, "a")) == 1

    run(body())


def test_an_empty_folder_in_its_place_takes_nothing_with_it(run: Any, bench: Any, root: Path) -> None:
    """As where a volume is not mounted: neither while the server runs nor at its start, and the log says it once."""

    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            await b.store.change("a", pinned=True, labels={"team": "x"}, aliases={"stable": 1}, dropped=())
            shutil.move(root, root.parent / "unmounted")
            os.mkdir(root)
            with capture_logs() as logs:
                await settle(watcher)
                await settle(watcher)
            assert [line["reason"] for line in logs] == ["it shows no adapter folder at all"]
            assert (await b.store.get("stable")).labels == {"team": "x"}
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            shutil.rmtree(root)
            shutil.move(root.parent / "unmounted", root)
            await settle(watcher)
            assert [entry.version for entry in b.registry.pinned()] == [1]

    run(body())


def test_new_dates_add_no_version_and_undo_no_rollback(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            shutil.rmtree(root / "a")
            adapter_folder("a", 2)
            await settle(watcher)
            await b.store.rollback("a", 1)
            os.utime(root / "a" / "adapter_config.json", (5, 5))
            await settle(watcher)
            assert ((await b.store.get("a")).version, len(versions(b, "a"))) == (1, 2)
        os.utime(root / "a" / "adapter_config.json", (6, 6))
        async with bench() as b:
            await settle(watch(b, root))
            assert ((await b.store.get("a")).version, len(versions(b, "a"))) == (1, 2)

    run(body())


def test_a_deletion_that_failed_is_tried_again(
    run: Any, bench: Any, root: Path, adapter_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        adapter_folder("stays", 9)
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            shutil.rmtree(root / "a")
            with monkeypatch.context() as broken:
                broken.setattr(b.registry, "delete", _fail)
                await settle(watcher)
                watcher._retries = dict.fromkeys(watcher._retries, 0.0)
                with capture_logs() as logs:
                    await settle(watcher)
                    await settle(watcher)
                assert logs == [], "told once"
            assert len(versions(b, "a")) == 1
            watcher._retries = dict.fromkeys(watcher._retries, 0.0)
            await settle(watcher)
            assert versions(b, "a") == []

    run(body())


def test_a_name_that_is_an_alias_now_is_tried_again(run: Any, bench: Any, root: Path, adapter_folder: Any) -> None:
    async def body() -> None:
        async with bench() as b:
            watcher = watch(b, root)
            await settle(watcher)
            await b.store.change("a", pinned=None, labels={}, aliases={"b": None}, dropped=())
            adapter_folder("b", 2)
            await settle(watcher)
            assert versions(b, "b") == []
            await b.store.change("a", pinned=None, labels={}, aliases={}, dropped=("b",))
            watcher._retries = dict.fromkeys(watcher._retries, 0.0)
            await settle(watcher)
            assert len(versions(b, "b")) == 1

    run(body())


def _fail(name: str) -> None:
    raise StorageFailed("Writing the registry failed.")


def test_a_slow_engine_does_not_make_looks_rare(
    run: Any, bench: Any, root: Path, adapter_folder: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest between looks follows from what a look costs, not from what came of it."""
    real = engine.load_adapter

    async def slow(use: Any) -> Any:
        await asyncio.sleep(0.4)
        return await real(use)

    monkeypatch.setattr(engine, "load_adapter", slow)
    adapter_folder("stays", 9)

    async def body() -> None:
        async with bench() as b:
            task = asyncio.create_task(Watcher(b.store, root, interval=0.02, patience=0.0).run())
            async with asyncio.timeout(4):
                while not versions(b, "a"):
                    await asyncio.sleep(0.02)
                shutil.rmtree(root / "a")
                while versions(b, "a"):
                    await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(body())


def test_a_server_watches_until_it_stops(
    run: Any, open_site: Any, root: Path, adapter_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching.Watcher.__init__, "__kwdefaults__", {"interval": 0.02, "patience": 0.0})

    async def body() -> None:
        async with open_site(watch=root) as site:
            await _until(site, "a", 200)
            adapter_folder("b", 2)
            await _until(site, "b", 200)
            shutil.rmtree(root / "a")
            await _until(site, "a", 404)
            assert (await site.complete(model="a")).status_code == 404
            assert (await site.complete(model="b")).status_code == 200

    run(body())


async def _until(site: Any, name: str, status: int) -> None:
    async with asyncio.timeout(10):
        while (await site.http.get(f"/v1/adapters/{name}")).status_code != status:
            await asyncio.sleep(0.02)
