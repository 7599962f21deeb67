"""Uploads from hostile and clumsy clients: refused with 4xx, and nothing stays behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.errors import AdapterRejected, EngineDead


def files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]


def test_refused_files_leave_nothing_behind(run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path) -> None:
    async def body() -> None:
        async with open_site() as site:
            folder = adapter_folder()
            site.engine.load_failure = AdapterRejected("r is 2, the tensors say 3", param="r")
            response = await site.upload("bad", folder)
            assert response.status_code == 400
            assert "tensors say 3" in response.json()["error"]["message"]
            site.engine.load_failure = EngineDead("it died")
            assert (await site.upload("bad", folder)).status_code == 503
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
            response = await site.upload(name, adapter_folder())
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


def test_an_upload_is_not_left_to_the_background(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            headers = {"content-type": "multipart/form-data; boundary=B"}
            response = await site.http.post("/v1/adapters?wait=false", content=form(NAME), headers=headers)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "wait")

    run(body())


def test_concurrent_uploads_of_one_name_are_versions(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            folders = [adapter_folder(f"f{i}", i) for i in range(6)]
            answers = await asyncio.gather(*(site.upload("a", folder) for folder in folders))
            assert sorted(answer.json()["version"] for answer in answers) == [1, 2, 3, 4, 5, 6]

    run(body())
