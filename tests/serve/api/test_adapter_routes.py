"""An adapter's life over HTTP, with the real registry: upload, versions, use, unload, delete, and every refusal."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase.adapters.errors import AdapterRejected, EngineDead
from onebase.serve.engine.messages import EngineStats


def files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]


async def upload(site: Any, name: str, folder: Path, **headers: str) -> Any:
    return await site.http.post("/v1/adapters", data={"name": name}, files=files_of(folder), headers=headers)


def test_upload_use_version_delete(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            first = await upload(site, "sql", adapter_folder("one", 1))
            assert first.status_code == 201, first.text
            card = first.json()
            assert (card["name"], card["version"], card["family"], card["rank"]) == ("sql", 1, "LORA", 2)
            assert (card["tier"], card["source"]) == ("device", "upload")
            second = (await upload(site, "sql", adapter_folder("two", 2))).json()
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
                await upload(site, name, adapter_folder(name, seed))
            await upload(site, "a-again", adapter_folder("again", 0))
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


def test_refused_files_leave_nothing_behind(run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path) -> None:
    async def body() -> None:
        async with open_site() as site:
            folder = adapter_folder()
            site.engine.load_failure = AdapterRejected("r is 2, the tensors say 3", param="r")
            response = await upload(site, "bad", folder)
            assert response.status_code == 400
            assert "tensors say 3" in response.json()["error"]["message"]
            site.engine.load_failure = EngineDead("it died")
            assert (await upload(site, "bad", folder)).status_code == 503
            site.engine.load_failure = None

            good = dict(files_of(folder)[i][1] for i in range(2))
            for name, content in (
                ("adapter_model.bin", b"x"),
                ("../../etc/passwd", b"x"),
                ("adapter_config.json/../x.safetensors", b"x"),
                ("adapter_model.safetensors", b"\xff" * 50),
                ("adapter_config.json", b"{"),
                ("adapter_config.json", b"[]"),
                ("", b"x"),
            ):
                files = [("files", item) for item in {**good, name: content}.items()]
                response = await site.http.post("/v1/adapters", data={"name": "bad"}, files=files)
                assert response.status_code == 400, (name, response.text)
            assert (await site.http.get("/v1/adapters")).json()["data"] == []
            assert list((tmp_path / "data" / "blobs").iterdir()) == []
            assert list((tmp_path / "data" / "staging").iterdir()) == []

    run(body())


@pytest.mark.parametrize(
    ("name", "status"),
    [("../e", 400), ("a,b", 400), ("x" * 129, 400), ("x" * 300, 400), ("", 400), ("é", 400), ("base", 409)],
)
def test_names_that_are_none(run: Any, open_site: Any, adapter_folder: Any, name: str, status: int) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await upload(site, name, adapter_folder())
            assert response.status_code == status, response.text
            assert (response.headers.get("x-should-retry") == "false") is (status == 409)
            assert site.engine.stats.resident == {}

    run(body())


def form(*parts: tuple[str, bytes], end: bytes = b"--B--\r\n") -> bytes:
    joined = b"".join(b"--B\r\n" + head.encode() + b"\r\n\r\n" + body + b"\r\n" for head, body in parts)
    return joined + end


NAME = ('Content-Disposition: form-data; name="name"', b"a")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=B"),
        (b"junk", "multipart/form-data; boundary=B"),
        (form(NAME), "multipart/form-data"),
        (form(NAME, end=b""), "multipart/form-data; boundary=B"),
        (form(NAME, NAME), "multipart/form-data; boundary=B"),
        (form(('Content-Disposition: form-data; name="pinned"', b"1"), NAME), "multipart/form-data; boundary=B"),
        (form(('Content-Disposition: form-data; name="name"', b"a" * 5000)), "multipart/form-data; boundary=B"),
        (form(("X: y", b"a")), "multipart/form-data; boundary=B"),
        (form(("X" * 100_000, b"a")), "multipart/form-data; boundary=B"),
        (form(*[("X: y", b"a")] * 100), "multipart/form-data; boundary=B"),
        (form(NAME), "multipart/form-data; boundary=" + "B" * 1000),
        (form(), "multipart/form-data; boundary=B"),
    ],
)
def test_malformed_forms_are_400(run: Any, open_site: Any, content: bytes, kind: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.http.post("/v1/adapters", content=content, headers={"content-type": kind})
            assert response.status_code == 400, response.text
            assert response.json()["error"]["message"]

    run(body())


def test_uploads_over_the_cap_are_413_declared_or_not(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def trickle(data: bytes) -> Any:
        for start in range(0, len(data), 65536):
            yield data[start : start + 65536]

    async def body() -> None:
        async with open_site(max_upload_gib=1e-6) as site:
            part = ('Content-Disposition: form-data; name="files"; filename="a.safetensors"', b"x" * (3 << 20))
            headers = {"content-type": "multipart/form-data; boundary=B"}
            for content in (form(NAME, part), trickle(form(NAME, part))):
                response = await site.http.post("/v1/adapters", content=content, headers=headers)
                assert response.status_code == 413, response.text

    run(body())


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


def test_load_and_unload(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await upload(site, "a", adapter_folder())
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
                await upload(site, name, folder)
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
                await upload(site, name, adapter_folder(name, seed))
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
            assert not any(path.exists() for path in paths)
            assert site.engine.stats.resident == {}

    run(body())


def test_concurrent_deletes_free_what_nobody_names(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for index in range(8):
                await upload(site, f"n{index}", adapter_folder(f"f{index}", index // 2))
            queries: list[str] = []
            site.server.loaded.store.registry._db._db.set_trace_callback(queries.append)
            answers = await asyncio.gather(*(site.http.delete(f"/v1/adapters/n{index}") for index in range(7)))
            assert [answer.status_code for answer in answers] == [200] * 7
            assert len(site.engine.stats.resident) == 1
            assert len(queries) < 7 * 12, "a delete asks for nothing by the number of names"
            assert (await site.complete(model="n7", max_tokens=1)).status_code == 200

    run(body())


def test_concurrent_uploads_of_one_name_are_versions(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            folders = [adapter_folder(f"f{i}", i) for i in range(6)]
            answers = await asyncio.gather(*(upload(site, "a", folder) for folder in folders))
            assert sorted(answer.json()["version"] for answer in answers) == [1, 2, 3, 4, 5, 6]

    run(body())


def test_vllm_routes(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        folder = adapter_folder()
        other = adapter_folder("other", 5)
        async with open_site(allow_path=(folder.parent,)) as site:

            async def load(**body: Any) -> Any:
                return await site.post("/v1/load_lora_adapter", **{"lora_name": "a", "lora_path": str(folder), **body})

            response = await load()
            assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' added successfully.")
            response = await load()
            assert response.status_code == 400
            assert "already been loaded" in response.json()["error"]["message"]
            assert (await load(lora_path=str(other), load_inplace=True)).status_code == 200
            assert (await site.http.get("/v1/adapters/a")).json()["version"] == 2
            assert (await load(lora_name="b", lora_path=str(folder / "nope"))).status_code == 404
            assert (await load(lora_name="b", lora_path="/etc")).status_code == 400
            assert (await load(lora_name="../b")).status_code == 400
            assert (await load(lora_name="base")).status_code == 400
            assert (await load(lora_name="")).status_code == 400
            assert (await site.post("/v1/load_lora_adapter", lora_name="b")).status_code == 400
            site.engine.load_failure = AdapterRejected("no")
            assert (await load(lora_name="b")).status_code == 400

            response = await site.post("/v1/unload_lora_adapter", lora_name="a")
            assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
            assert (await site.post("/v1/unload_lora_adapter", lora_name="a")).status_code == 404
            assert (await site.post("/v1/unload_lora_adapter")).status_code == 400
            assert (await site.complete(model="a")).status_code == 404

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
            card = (await upload(site, "a", newer)).json()
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


KEYS = {"api_key": "user", "admin_key": "root"}


@pytest.mark.parametrize(
    ("keys", "given", "inference", "admin"),
    [
        ({}, None, 200, 200),
        (KEYS, None, 401, 401),
        (KEYS, "wrong", 401, 401),
        (KEYS, "user", 200, 403),
        (KEYS, "root", 200, 200),
        (KEYS, "üser", 401, 401),
        ({"api_key": "user"}, "user", 200, 200),
        ({"api_key": "user"}, None, 401, 401),
        ({"admin_key": "root"}, None, 200, 401),
    ],
)
def test_keys(run: Any, open_site: Any, keys: dict[str, str], given: str | None, inference: int, admin: int) -> None:
    async def body() -> None:
        async with open_site(**keys) as site:
            if given is not None:
                site.http.headers = httpx.Headers([(b"authorization", f"Bearer {given}".encode())])
            assert (await site.http.get("/v1/models")).status_code == inference
            assert (await site.complete(max_tokens=1)).status_code == inference
            assert (await site.chat(max_tokens=1)).status_code == inference
            assert (await site.post("/tokenize", prompt="x")).status_code == inference
            assert (await site.http.get("/v1/adapters")).status_code == admin
            for path in ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
                status = (await site.post(path)).status_code
                assert status == (400 if admin == 200 else admin)
            for path in ("/health", "/ready", "/metrics", "/version"):
                assert (await site.http.get(path)).status_code == 200
            for path in ("//v1/models", "/v1/models/", "/V1/models", "/v1/models?x=/health"):
                assert (await site.http.get(path)).status_code in {inference, 404, 307, 400 if inference == 200 else 0}

    run(body())


def test_a_key_in_another_scheme_is_no_key(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site(**KEYS) as site:
            for value in ("Basic user", "user", "Bearer", "Bearer user extra", "Bearer  "):
                response = await site.http.get("/v1/models", headers={"authorization": value})
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"

    run(body())


def test_web_pages_of_other_origins_cannot_change_adapters(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            folder = adapter_folder()
            assert (await upload(site, "a", folder, origin="https://evil.example")).status_code == 403
            assert (await upload(site, "a", folder, origin="null")).status_code == 403
            assert (await upload(site, "a", folder, origin="http://localhost")).status_code == 201

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
