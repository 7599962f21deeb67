"""Adapters that the server fetches: allowed places, imports that are waited for or not, the resolver."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import SourceFailed

from .fake_sources import FakeSources


def test_folders_only_below_allow_path(run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path) -> None:
    async def body() -> None:
        folder = adapter_folder()
        async with open_site() as site:
            response = await site.post("/v1/adapters", name="a", source=str(folder))
            assert response.status_code == 400
            assert "--allow-path" in response.json()["error"]["message"]
        outside = tmp_path / "outside"
        outside.mkdir()
        link = folder.parent / "link"
        link.symlink_to(outside)
        async with open_site(allow_path=(folder.parent,), data_dir=tmp_path / "other") as site:
            response = await site.post("/v1/adapters", name="a", source=str(folder))
            assert response.status_code == 201
            assert response.json()["source"] == str(folder)
            for source in ("/", str(outside), str(link), f"{folder}/../../outside", "\x00", "etc", str(folder) + "x"):
                response = await site.post("/v1/adapters", name="b", source=source)
                assert response.status_code in {400, 404}, source
            assert (await site.post("/v1/adapters", name="b", source=str(folder), revision="x")).status_code == 400

    run(body())


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, adapter_folder: Any) -> FakeSources:
    """What the server takes for the world: ``one`` and ``two`` are adapters, and the resolver finds ``known``."""
    folders = {"one": adapter_folder("one", 1), "two": adapter_folder("two", 2), "at/known": adapter_folder("known", 3)}
    fake = FakeSources(folders, "at/{name}")
    monkeypatch.setattr("onebase.serve.api.lifecycle.Sources", lambda options: fake)
    return fake


async def until_state(site: Any, name: str, *states: str) -> Any:
    async with asyncio.timeout(10):
        while True:
            card = (await site.http.get(f"/v1/adapters/{name}")).json()
            if card.get("state") in states:
                return card
            await asyncio.sleep(0.005)


def test_a_fetch_is_waited_for(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.post("/v1/adapters", name="a", source="one", revision="main")
            assert response.status_code == 201, response.text
            card = response.json()
            assert (card["source"], card["revision"], card["by"]) == ("one", "main", "anonymous")
            assert (card["state"], card["reason"], card["version"]) == ("ready", None, 1)
            response = await site.post("/v1/adapters", name="b", source="nothing")
            assert response.status_code == 404
            assert (await site.http.get("/v1/adapters/b")).json()["state"] == "failed"

    run(body())


def test_a_fetch_that_nobody_waits_for_shows_its_state(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            sources.resolver = None
            sources.gate.clear()
            response = await site.http.post("/v1/adapters?wait=false", json={"name": "a", "source": "one"})
            assert response.status_code == 202, response.text
            assert (response.json()["state"], response.json()["version"]) == ("fetching", None)
            assert (await site.complete(model="a")).status_code == 404
            listed = (await site.http.get("/v1/adapters?state=fetching")).json()["data"]
            assert [card["name"] for card in listed] == ["a"]
            assert (await site.http.get("/v1/adapters")).json()["data"] == []
            assert 'onebase_adapter_state{model="a",state="importing"} 1.0' in (await site.http.get("/metrics")).text
            other = await site.http.post("/v1/adapters?wait=false", json={"name": "a", "source": "two"})
            assert other.status_code == 409
            sources.gate.set()
            card = await until_state(site, "a", "ready", "failed")
            assert (card["state"], card["version"]) == ("ready", 1)
            assert (await site.complete(model="a", max_tokens=1)).status_code == 200

    run(body())


def test_a_failed_fetch_says_why_and_the_old_version_serves(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.post("/v1/adapters", name="a", source="one")
            sources.failures["two"] = SourceFailed("two is down.", param="source")
            assert (await site.post("/v1/adapters", name="a", source="two")).status_code == 502
            card = (await site.http.get("/v1/adapters/a")).json()
            assert (card["state"], card["reason"], card["version"]) == ("failed", "two is down.", 1)
            assert (await site.http.get("/v1/adapters/a@1")).json()["state"] == "ready"
            failed = (await site.http.get("/v1/adapters?state=failed")).json()["data"]
            assert [card["name"] for card in failed] == ["a"]
            assert (await site.http.get("/v1/adapters?state=failed&label=x:y")).json()["data"] == []
            assert 'onebase_adapter_state{model="a",state="failed"} 1.0' in (await site.http.get("/metrics")).text
            assert (await site.complete(model="a", max_tokens=1)).status_code == 200
            del sources.failures["two"]
            await site.post("/v1/adapters", name="a", source="two")
            card = (await site.http.get("/v1/adapters/a")).json()
            assert (card["state"], card["reason"], card["version"]) == ("ready", None, 2)
            assert (await site.http.get("/v1/adapters?state=failed")).json()["data"] == []

    run(body())


def test_a_delete_ends_an_import_and_removes_one_that_failed(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            sources.gate.clear()
            waiting = asyncio.create_task(site.post("/v1/adapters", name="a", source="one"))
            await until_state(site, "a", "fetching")
            deleted = await site.http.delete("/v1/adapters/a")
            assert (deleted.status_code, deleted.json()["versions"]) == (200, [])
            assert (await site.http.get("/v1/adapters/a")).status_code == 404
            sources.gate.set()
            assert (await waiting).status_code == 409
            assert (await site.http.get("/v1/adapters/a")).status_code == 404
            assert 'model="a"' not in (await site.http.get("/metrics")).text
            assert (await site.post("/v1/adapters", name="b", source="nothing")).status_code == 404
            assert (await site.http.get("/v1/adapters/b")).json()["state"] == "failed"
            assert (await site.http.delete("/v1/adapters/b")).status_code == 200
            for answer in (await site.http.get("/v1/adapters/b"), await site.http.delete("/v1/adapters/b")):
                assert answer.status_code == 404

    run(body())


def test_a_gc_forgets_what_failed(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            assert (await site.post("/v1/adapters", name="a", source="nothing")).status_code == 404
            assert 'onebase_adapter_state{model="a",state="failed"} 1.0' in (await site.http.get("/metrics")).text
            assert (await site.http.post("/v1/registry/gc")).json()["imports"] == 1
            assert 'model="a"' not in (await site.http.get("/metrics")).text
            assert (await site.http.get("/v1/adapters?state=failed")).json()["data"] == []

    run(body())


def test_pages_of_imports(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            for name in ("c", "a", "b"):
                await site.post("/v1/adapters", name=name, source="nothing")
            first = (await site.http.get("/v1/adapters?state=failed&limit=2")).json()
            assert ([card["name"] for card in first["data"]], first["next"]) == (["a", "b"], "b")
            last = (await site.http.get("/v1/adapters?state=failed&limit=2&after=b")).json()
            assert ([card["name"] for card in last["data"]], last["has_more"]) == (["c"], False)

    run(body())


def test_an_upload_after_a_failed_fetch_is_ready(
    run: Any, open_site: Any, sources: FakeSources, adapter_folder: Any
) -> None:
    async def body() -> None:
        async with open_site() as site:
            assert (await site.post("/v1/adapters", name="a", source="nothing")).status_code == 404
            await site.upload("a", adapter_folder("up", 7))
            assert (await site.http.get("/v1/adapters/a")).json()["state"] == "ready"
            assert (await site.http.get("/v1/adapters?state=failed")).json()["data"] == []
            await site.http.delete("/v1/adapters/a")
            assert 'model="a"' not in (await site.http.get("/metrics")).text

    run(body())


def test_an_unknown_model_is_fetched_once(run: Any, open_site: Any, sources: FakeSources) -> None:
    async def body() -> None:
        async with open_site() as site:
            calls = [site.complete(model="known", max_tokens=1) for _ in range(5)]
            assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 5
            assert sources.fetched == ["at/known"]
            assert (await site.http.get("/v1/adapters/known")).json()["by"] == "resolver"
            response = await site.complete(model="unknown")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
            for other in ("/v1/models/unheard", "/v1/adapters/unheard"):
                assert (await site.http.get(other)).status_code == 404
            assert "at/unheard" not in sources.fetched, "only requests for an answer fetch"
            await site.complete(adapters=[{"name": "nope"}])
            assert "at/nope" in sources.fetched

    run(body())


@pytest.mark.parametrize(
    ("keys", "given", "by"),
    [
        ({}, None, "anonymous"),
        ({"api_key": "user"}, "user", "api"),
        ({"api_key": "user", "admin_key": "root"}, "root", "admin"),
    ],
)
def test_who_made_a_version(
    run: Any, open_site: Any, adapter_folder: Any, keys: dict[str, str], given: str | None, by: str
) -> None:
    async def body() -> None:
        folder = adapter_folder("start", 1)
        async with open_site(adapter=(f"start={folder}",), **keys) as site:
            if given is not None:
                site.http.headers["authorization"] = f"Bearer {given}"
            assert (await site.upload("a", adapter_folder("up", 2))).json()["by"] == by
            assert (await site.http.get("/v1/adapters/start")).json()["by"] == "cli:--adapter"

    run(body())
