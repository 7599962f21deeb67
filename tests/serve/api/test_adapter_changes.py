"""Pins, labels, aliases, rollback, gc and unloading over HTTP; what the engine is told, and when."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from onebase.adapters.errors import AdapterUnloaded
from onebase.serve.engine.messages import AdapterGone

AS_JSON = {"content-type": "application/json"}


async def versions(site: Any, adapter_folder: Any, count: int, name: str = "a") -> list[str]:
    """Uploads so many versions; their digests."""
    return [(await site.upload(name, adapter_folder(f"{name}{seed}", seed))).json()["digest"] for seed in range(count)]


async def patch(site: Any, name: str = "a", **body: Any) -> Any:
    return await site.http.patch(f"/v1/adapters/{name}", json=body)


def test_patch_changes_what_it_names_and_nothing_else(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 2)
            card = (await patch(site, pinned=True, labels={"team": "x", "env": "prod"})).json()
            assert (card["pinned"], card["labels"], card["aliases"]) == (True, {"team": "x", "env": "prod"}, [])
            card = (
                await patch(site, labels={"env": None, "tier": "1"}, aliases={"stable": 1, "edge": "current"})
            ).json()
            assert (card["pinned"], card["labels"]) == (True, {"team": "x", "tier": "1"})
            assert card["aliases"] == ["edge", "stable"]
            card = (await patch(site, aliases={"stable": None, "beta": 2})).json()
            assert card["aliases"] == ["beta", "edge"]
            assert (await site.http.get("/v1/adapters/a")).json() == card

    run(body())


def test_aliases_answer_as_models(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            first, second = await versions(site, adapter_folder, 2)
            await patch(site, aliases={"stable": 1, "edge": "current"})
            for alias, digest in (("stable", first), ("edge", second), (f"a@sha256:{first[:12]}", first)):
                response = await site.complete(model=alias, max_tokens=1)
                assert response.json()["model"] == alias
                assert site.engine.requests[-1].adapters[0].digest == digest
            third = (await site.upload("a", adapter_folder("third", 9))).json()["digest"]
            await site.complete(model="edge", max_tokens=1)
            assert site.engine.requests[-1].adapters[0].digest == third
            assert (await site.upload("stable", adapter_folder("x", 8))).status_code == 409
            await site.upload("other", adapter_folder("y", 7))
            response = await patch(site, aliases={"other": 1})
            assert (response.status_code, response.json()["error"]["param"]) == (409, "aliases")
            assert response.headers["x-should-retry"] == "false"

    run(body())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, "pinned"),
        ({"pinned": None}, "pinned"),
        ({"pinned": "true"}, "pinned"),
        ({"pinned": 1}, "pinned"),
        ({"labels": []}, "labels"),
        ({"labels": {"k": 1}}, "labels.k"),
        ({"labels": {"": "v"}}, "labels"),
        ({"labels": {"a b": "v"}}, "labels"),
        ({"labels": {"k\x00": "v"}}, "labels"),
        ({"labels": {"k": "v\n"}}, "labels"),
        ({"labels": {"k": "\ud800"}}, None),
        ({"labels": {"k": "v" * 257}}, "labels.k"),
        ({"labels": {"k" * 64: "v"}}, "labels"),
        ({"labels": {f"k{i}": "v" for i in range(65)}}, "labels"),
        ({"aliases": {"x": 0}}, "aliases.x"),
        ({"aliases": {"x": "1"}}, "aliases.x"),
        ({"aliases": {"x": True}}, "aliases.x"),
        ({"aliases": {"x": "latest"}}, "aliases.x"),
        ({"aliases": {"x": 10**20}}, "aliases.x"),
        ({"aliases": {"../x": 1}}, "aliases"),
        ({"aliases": {"a,b": 1}}, "aliases"),
        ({"name": "b"}, "name"),
        ({"version": 1}, "version"),
    ],
)
def test_bad_changes_are_400_and_change_nothing(
    run: Any, open_site: Any, adapter_folder: Any, change: dict[str, Any], param: str | None
) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 1)
            before = (await site.http.get("/v1/adapters/a")).json()
            response = await site.http.patch("/v1/adapters/a", content=json.dumps(change), headers=AS_JSON)
            assert response.status_code == 400, response.text
            assert param is None or (response.json()["error"]["param"] or "").startswith(param)
            assert (await site.http.get("/v1/adapters/a")).json() == before

    run(body())


def test_no_alias_is_the_name_of_the_base(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 1)
            response = await patch(site, labels={"k": "v"}, aliases={"base": 1})
            assert (response.status_code, response.json()["error"]["param"]) == (409, "aliases")
            assert (await site.http.get("/v1/adapters/a")).json()["labels"] == {}
            assert (await patch(site, aliases={"stable": 1})).status_code == 200
        for name in ("a", "stable"):
            with capture_logs() as logs:
                async with open_site(served_model_name=name) as site:
                    assert (await site.complete(model=name, max_tokens=1)).headers["x-onebase-adapters"] == "base"
                    assert (await patch(site, aliases={"stable": None, "other": 1})).status_code == 200
                    await patch(site, aliases={"other": None} if name == "stable" else {"stable": 1, "other": None})
            said = [line["adapter"] for line in logs if line["event"] == "the base model's name hides an adapter"]
            assert said == ["a"]

    run(body())


def test_a_change_holds_whole_or_not_at_all(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 1)
            response = await patch(site, labels={"k": "v"}, pinned=True, aliases={"x": 7})
            assert response.status_code == 404
            card = (await site.http.get("/v1/adapters/a")).json()
            assert (card["labels"], card["pinned"], card["aliases"]) == ({}, False, [])
            assert (await patch(site, "nope", pinned=True)).status_code == 404
            assert (await patch(site, "a@1", pinned=True)).status_code == 400

    run(body())


def test_rollback_and_back(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            digests = await versions(site, adapter_folder, 3)

            async def rollback(**options: Any) -> Any:
                return await site.http.post("/v1/adapters/a/rollback", **options)

            assert (await rollback()).json()["version"] == 2
            assert (await rollback(json={})).json()["version"] == 3, "what was current before"
            assert (await rollback(json={"version": 1})).json()["version"] == 1
            await site.complete(model="a", max_tokens=1)
            assert site.engine.requests[-1].adapters[0].digest == digests[0]
            listed = (await site.http.get("/v1/adapters/a/versions")).json()["data"]
            assert [(card["version"], card["current"]) for card in listed] == [(1, True), (2, False), (3, False)]
            assert (await rollback(json={"version": 9})).status_code == 404
            for wrong in ({"version": 0}, {"version": "1"}, {"version": 1.5}, {"to": 1}, [], 1):
                assert (await rollback(json=wrong)).status_code == 400, wrong
            assert (await rollback(content=b"{", headers={"content-type": "application/json"})).status_code == 400
            assert (await site.http.post("/v1/adapters/nope/rollback")).status_code == 404

    run(body())


def test_a_name_with_one_version_has_nothing_to_go_back_to(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 1)
            response = await site.http.post("/v1/adapters/a/rollback")
            assert (response.status_code, response.json()["error"]["param"]) == (404, "version")

    run(body())


def test_the_engine_knows_the_pins_after_every_change_and_start(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        def pins(site: Any) -> list[str]:
            return [use.digest for use in site.engine.pins]

        async with open_site() as site:
            first, second = await versions(site, adapter_folder, 2)
            await versions(site, adapter_folder, 1, "b")
            assert pins(site) == []
            await patch(site, pinned=True)
            assert pins(site) == [second]
            assert (await site.http.post("/v1/adapters/a/unload")).status_code == 409
            await site.http.post("/v1/adapters/a/rollback")
            assert pins(site) == [first]
            third = (await site.upload("a", adapter_folder("third", 9))).json()["digest"]
            assert pins(site) == [third]
            site.engine.pins = ()
            await site.engine.start()  # as after a crash
            while not pins(site):
                await asyncio.sleep(0.001)
            assert pins(site) == [third]
            await site.http.delete("/v1/adapters/a")
            assert pins(site) == []
        async with open_site() as site:
            await patch(site, "b", pinned=True)
        site.engine.pins = ()
        async with open_site() as site:
            assert len(pins(site)) == 1, "pins outlive the server"

    run(body())


def test_a_replaced_version_leaves_with_its_last_request(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            (old,) = await versions(site, adapter_folder, 1)
            site.engine.pause = asyncio.Event()
            call = asyncio.create_task(site.complete(model="a", max_tokens=1))
            while not site.engine.requests:
                await asyncio.sleep(0.001)
            new = (await site.upload("a", adapter_folder("new", 9))).json()["digest"]
            await site.idle()
            assert set(site.engine.stats.resident) == {old, new}
            site.engine.pause.set()
            assert (await call).status_code == 200
            await site.idle()
            assert set(site.engine.stats.resident) == {new}
            assert (await site.complete(model="a@1", max_tokens=1)).status_code == 200, "it may come back"

    run(body())


def test_a_version_that_an_alias_means_stays(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            (old,) = await versions(site, adapter_folder, 1)
            await patch(site, aliases={"stable": 1})
            new = (await site.upload("a", adapter_folder("new", 9))).json()["digest"]
            await site.idle()
            assert set(site.engine.stats.resident) == {old, new}
            await patch(site, aliases={"stable": None})
            await site.upload("a", adapter_folder("newer", 8))
            await site.idle()
            assert new not in site.engine.stats.resident

    run(body())


def test_a_rollback_in_time_keeps_what_was_to_leave(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            (old,) = await versions(site, adapter_folder, 1)
            site.engine.pause = asyncio.Event()
            call = asyncio.create_task(site.complete(model="a", max_tokens=1))
            while not site.engine.requests:
                await asyncio.sleep(0.001)
            await site.upload("a", adapter_folder("new", 9))
            await site.http.post("/v1/adapters/a/rollback")
            site.engine.pause.set()
            await call
            await site.idle()
            assert set(site.engine.stats.resident) == {old}

    run(body())


def test_what_is_uploaded_again_does_not_leave_under_the_uploaders_feet(
    run: Any, open_site: Any, adapter_folder: Any
) -> None:
    async def body() -> None:
        async with open_site() as site:
            (old,) = await versions(site, adapter_folder, 1)
            site.engine.pause = asyncio.Event()
            call = asyncio.create_task(site.complete(model="a", max_tokens=1))
            while not site.engine.requests:
                await asyncio.sleep(0.001)
            await site.upload("a", adapter_folder("new", 9))
            load, loading, go = site.engine.load_adapter, asyncio.Event(), asyncio.Event()

            async def slow(use: Any) -> Any:
                loading.set()
                await go.wait()
                assert old in site.engine.stats.resident, "its last request has ended meanwhile"
                return await load(use)

            site.engine.load_adapter = slow
            again = asyncio.create_task(site.upload("a", adapter_folder("again", 0)))
            await loading.wait()
            site.engine.pause.set()
            assert (await call).status_code == 200
            await site.idle()
            go.set()
            card = (await again).json()
            assert (card["version"], card["digest"], card["tier"]) == (3, old, "device")

    run(body())


def test_unload_waits_or_not_and_says_what_it_aborted(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            (digest,) = await versions(site, adapter_folder, 1)
            asked: list[tuple[str, bool]] = []
            free = asyncio.Event()

            async def unload(digest: str, *, force: bool = False) -> AdapterGone:
                asked.append((digest, force))
                await free.wait()
                return AdapterGone("1", digest, True, 3 if force else 0)

            site.engine.unload_adapter = unload
            response = await site.http.post("/v1/adapters/a/unload?wait=false")
            assert (response.status_code, response.json()["tier"]) == (202, "device")
            call = asyncio.create_task(site.http.post("/v1/adapters/a/unload?force=true"))
            while len(asked) < 2:
                await asyncio.sleep(0.001)
            assert not call.done()
            free.set()
            card = (await call).json()
            assert (card["was_resident"], card["aborted"]) == (True, 3)
            assert asked == [(digest, False), (digest, True)]

    run(body())


@pytest.mark.parametrize("shared", [None, "current", "older", "aliased"])
def test_delete_by_force_ends_the_requests_of_content_without_a_name(
    run: Any, open_site: Any, adapter_folder: Any, shared: str | None
) -> None:
    async def body() -> None:
        async with open_site() as site:
            (digest,) = await versions(site, adapter_folder, 1)
            if shared:
                await site.upload("b", adapter_folder("b", 0))
            if shared == "aliased":
                await patch(site, "b", aliases={"stable": 1})
            if shared in ("older", "aliased"):
                await site.upload("b", adapter_folder("newer", 5))
            forced: list[str] = []

            async def unload(digest: str, *, force: bool = False) -> AdapterGone:
                forced.extend([digest] * force)
                return AdapterGone("1", digest, True)

            site.engine.unload_adapter = unload
            assert (await site.http.delete("/v1/adapters/a?force=true")).status_code == 200
            assert forced == ([] if shared else [digest])

    run(body())


def test_aborted_requests_are_told_why(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 1)
            site.engine.failure = AdapterUnloaded("an adapter of this request was unloaded by force", param="model")
            response = await site.complete(model="a")
            assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_unloaded")
            assert response.headers["x-should-retry"] == "false"

    run(body())


def test_gc_keeps_what_is_used_and_says_what_went(
    run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path
) -> None:
    async def body() -> None:
        async with open_site() as site:
            digests = await versions(site, adapter_folder, 5)
            await site.upload("gc", adapter_folder("gc", 20))
            await patch(site, aliases={"stable": 1})

            async def gc(**body: Any) -> Any:
                return (await site.post("/v1/registry/gc", **body)).json()

            assert (await gc())["versions"] == []
            would = await gc(keep=0, dry_run=True)
            assert (would["versions"], would["dry_run"]) == (["a@2", "a@3"], True)
            assert len((await site.http.get("/v1/adapters/a/versions")).json()["data"]) == 5
            seen, after = [], 0
            while after is not None:
                page = (await site.http.get(f"/v1/adapters/a/versions?limit=2&after={after}")).json()
                assert page["has_more"] == (page["next"] is not None) == (len(seen) + len(page["data"]) < 5)
                seen, after = [*seen, *(card["version"] for card in page["data"])], page["next"]
            assert seen == [1, 2, 3, 4, 5]
            assert (await site.http.get("/v1/adapters/a/versions?limit=0")).status_code == 400
            assert (await site.http.get("/v1/adapters/none/versions?after=3")).status_code == 404
            done = await gc(keep=0)
            assert (done["versions"], sorted(done["blobs"])) == (["a@2", "a@3"], sorted(digests[1:3]))
            assert done["bytes"] > 0
            left = {folder.name for folder in (tmp_path / "data" / "blobs").iterdir()}
            assert left.isdisjoint(digests[1:3])
            assert {digests[0], *digests[3:]} <= left
            assert (await site.http.post("/v1/adapters/a/rollback")).json()["version"] == 4, "it goes back all the same"
            assert (await site.complete(model="a@2")).status_code == 404
            assert (await site.http.get("/v1/adapters/gc")).json()["name"] == "gc", "a name like any other"
            for wrong in ({"keep": -1}, {"keep": "1"}, {"dry_run": 1}, {"all": True}):
                assert (await site.post("/v1/registry/gc", **wrong)).status_code == 400, wrong

    run(body())


def test_a_single_version_is_not_deleted(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await versions(site, adapter_folder, 2)
            response = await site.http.delete("/v1/adapters/a@1")
            assert response.status_code == 400
            assert "/v1/registry/gc" in response.json()["error"]["message"]
            assert len((await site.http.get("/v1/adapters/a/versions")).json()["data"]) == 2

    run(body())
