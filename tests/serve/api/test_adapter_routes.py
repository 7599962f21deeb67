"""An adapter's life over HTTP, with the real registry: upload, versions, use, unload, delete."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import AdapterRejected
from onebase.serve.engine.messages import EngineStats


def test_upload_use_version_delete(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            first = await site.upload("sql", adapter_folder("one", 1))
            assert first.status_code == 201, first.text
            card = first.json()
            assert (card["name"], card["version"], card["family"], card["rank"]) == ("sql", 1, "LORA", 2)
            assert (card["tier"], card["source"]) == ("device", "upload")
            second = (await site.upload("sql", adapter_folder("two", 2))).json()
            assert second["version"] == 2
            assert second["digest"] != card["digest"]
            versions = (await site.http.get("/v1/adapters/sql/versions")).json()["data"]
            assert [v["version"] for v in versions] == [1, 2]

            for model, digest in (("sql", second["digest"]), ("sql@1", card["digest"]), ("sql@2", second["digest"])):
                response = await site.complete(model=model, max_tokens=1)
                assert response.json()["model"] == model
                (use,) = site.engine.requests[-1].adapters
                assert (use.digest, use.scale) == (digest, 1.0)
                assert "adapter_config.json" in os.listdir(use.path)
            assert response.headers["x-onebase-adapters"] == "sql@2;scale=1"

            listed = (await site.http.get("/v1/models")).json()["data"]
            assert [(m["id"], m["parent"], m["root"]) for m in listed] == [
                ("base", None, site.server.settings.model),
                ("sql", "base", "upload"),
            ]
            assert (await site.http.get("/v1/models/sql@1")).json()["id"] == "sql@1"

            gone = (await site.http.delete("/v1/adapters/sql")).json()
            assert gone == {"name": "sql", "object": "adapter", "deleted": True, "versions": [1, 2]}
            assert site.engine.stats.resident == {}
            assert (await site.complete(model="sql")).status_code == 404
            assert (await site.http.delete("/v1/adapters/sql")).status_code == 404

    run(body())


def test_several_adapters_on_one_request(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for seed, name in enumerate(("a", "b", "c")):
                await site.upload(name, adapter_folder(name, seed))
            await site.upload("a-again", adapter_folder("again", 0))
            extra = [{"name": "b", "scale": 0.5}, {"name": "c", "scale": -1}]
            response = await site.complete(model="a", adapters=extra, max_tokens=1)
            assert response.json()["model"] == "a+b+c"
            assert response.headers["x-onebase-adapters"] == "a@1;scale=1, b@1;scale=0.5, c@1;scale=-1"
            assert [use.scale for use in site.engine.requests[-1].adapters] == [1.0, 0.5, -1.0]
            response = await site.complete(adapters=extra[:1], max_tokens=1)
            assert [use.scale for use in site.engine.requests[-1].adapters] == [0.5]
            for twice in ("a", "a@1", "a-again"):
                response = await site.complete(model="a", adapters=[{"name": twice}])
                assert response.status_code == 400
                assert response.json()["error"]["param"] == "adapters"

    run(body())


def test_load_and_unload(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.upload("a", adapter_folder())
            for was_resident in (True, False):
                card = (await site.http.post("/v1/adapters/a/unload")).json()
                assert (card["tier"], card["was_resident"]) == ("disk", was_resident)
            assert (await site.http.get("/v1/adapters/a")).json()["tier"] == "disk"
            assert (await site.http.post("/v1/adapters/a@1/load")).json()["tier"] == "device"
            assert (await site.http.get("/v1/adapters")).json()["data"][0]["tier"] == "device"
            for verb in ("load", "unload"):
                assert (await site.http.post(f"/v1/adapters/nope/{verb}")).status_code == 404

    run(body())


def test_deleting_one_of_two_names_keeps_the_shared_blob(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            folder = adapter_folder()
            for name in ("a", "b"):
                await site.upload(name, folder)
            await site.http.delete("/v1/adapters/a")
            assert len(site.engine.stats.resident) == 1
            assert (await site.complete(model="b", max_tokens=1)).status_code == 200

    run(body())


@pytest.mark.parametrize("stream", [False, True])
def test_requests_in_flight_keep_the_files_of_a_deleted_adapter(
    run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path, stream: bool
) -> None:
    async def body() -> None:
        async with open_site() as site:
            for seed, name in enumerate(("a", "b")):
                await site.upload(name, adapter_folder(name, seed))
            site.engine.pause = asyncio.Event()
            calls = [
                asyncio.create_task(site.complete(model=model, stream=stream, n=2, max_tokens=4))
                for model in ("a", "a@1", "b")
            ]
            while len(site.engine.requests) < 6:
                await asyncio.sleep(0.001)
            for name in ("a", "b"):
                assert (await site.http.delete(f"/v1/adapters/{name}")).status_code == 200
                assert (await site.complete(model=name)).status_code == 404
            paths = {Path(use.path) for request in site.engine.requests for use in request.adapters}
            assert len(paths) == 2
            assert all((path / "adapter_config.json").is_file() for path in paths)
            assert len(site.engine.stats.resident) == 2
            site.engine.pause.set()
            assert [(await call).status_code for call in calls] == [200, 200, 200]
            await site.idle()
            assert not any(path.exists() for path in paths)
            assert site.engine.stats.resident == {}

    run(body())


def test_concurrent_deletes_free_what_nobody_names(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for index in range(8):
                await site.upload(f"n{index}", adapter_folder(f"f{index}", index // 2))
            queries: list[str] = []
            site.server.loaded.store.registry._db._db.set_trace_callback(queries.append)
            answers = await asyncio.gather(*(site.http.delete(f"/v1/adapters/n{index}") for index in range(7)))
            assert [answer.status_code for answer in answers] == [200] * 7
            assert len(site.engine.stats.resident) == 1
            assert len(queries) < 7 * 12, "a delete asks for nothing by the number of names"
            assert (await site.complete(model="n7", max_tokens=1)).status_code == 200

    run(body())


def test_adapters_of_the_command_line_are_there_when_ready(
    run: Any, open_site: Any, adapter_folder: Any, engine: Any
) -> None:
    async def body() -> None:
        folder = adapter_folder()
        for _ in range(2):
            async with open_site(adapter=(f"a={folder}",)) as site:
                assert (await site.complete(model="a", max_tokens=1)).status_code == 200
                assert (await site.http.get("/v1/adapters/a")).json()["version"] == 1
        engine.load_failure = AdapterRejected("does not fit")
        async with open_site(wait=False, adapter=(f"b={folder}",)) as site:
            await site.settled()
            assert "does not fit" in site.server.failure
            assert "b=" in site.server.failure

    run(body())


def test_a_restart_with_the_same_folders_keeps_newer_uploads(
    run: Any, open_site: Any, adapter_folder: Any, engine: Any
) -> None:
    async def body() -> None:
        folder, newer = adapter_folder("one", 1), adapter_folder("two", 2)
        async with open_site(adapter=(f"a={folder}",)) as site:
            card = (await site.upload("a", newer)).json()
            assert card["version"] == 2
        engine.stats = EngineStats()
        async with open_site(adapter=(f"a={folder}",)) as site:
            assert (await site.http.get("/v1/adapters/a")).json()["version"] == 2
            assert list(engine.stats.resident) == [card["digest"]], "what answers is loaded before the first request"
            assert len((await site.http.get("/v1/adapters/a/versions")).json()["data"]) == 2
            await site.http.delete("/v1/adapters/a")
        async with open_site(adapter=(f"a={folder}",)) as site:
            assert (await site.http.get("/v1/adapters/a")).json()["version"] == 3
        changed = adapter_folder("three", 3)
        async with open_site(adapter=(f"a={changed}",)) as site:
            assert (await site.http.get("/v1/adapters/a")).json()["version"] == 4

    run(body())


def test_openapi_document_names_every_body(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            drawn = (await site.http.get("/openapi.json")).json()
            text = json.dumps(drawn)
            known = drawn["components"]["schemas"]
            for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
                assert reference in known
            assert "temperature" in known["ChatRequest"]["properties"]

    run(body())
