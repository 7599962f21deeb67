"""Names of adapters and of files from hostile clients: 400, nothing written, nothing asked of the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

HOSTILE = (
    "..", ".", "../e", "..\\e", "/etc/passwd", "a/b", "a\\b", "a\x00", "\x00", "a\n", "a\r\nb", "a\tb", "a,b", "a b",
    " a", "a ", "a+b", "a@1", "a@sha256:" + "0" * 12, "-a", "_a", ".a", "a:b", "a%2f..", "a;b", "a'b", 'a"b', "a\\",
    "<a>", "{a}", "\N{CYRILLIC SMALL LETTER A}", "a\N{COMBINING ACUTE ACCENT}", "\N{FULLWIDTH LATIN SMALL LETTER A}",
    "a\N{ZERO WIDTH SPACE}",
    "\N{RIGHT-TO-LEFT OVERRIDE}a", "a\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{FOX FACE}", "K\N{KELVIN SIGN}",
    "a\N{FULLWIDTH COMMA}b", "a\N{FULLWIDTH FULL STOP}", "a" * 129, "a" * 5000, "", "\ufeffa", "\ufffd",
)  # fmt: skip


def part(disposition: str, data: bytes) -> bytes:
    return b"--B\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


def form(name: str, files: dict[str, bytes]) -> bytes:
    """As raw bytes: client libraries escape what is to arrive as it is."""
    parts = [part(f'name="files"; filename="{file}"', data) for file, data in files.items()]
    return part('name="name"', name.encode()) + b"".join(parts) + b"--B--\r\n"


def trace(data: Path) -> list[str]:
    """All files and folders below the data folder, but for the registry's own."""
    return sorted(str(path.relative_to(data)) for path in data.rglob("*") if not path.name.startswith("registry."))


async def send(site: Any, content: Any) -> Any:
    return await site.http.post(
        "/v1/adapters", content=content, headers={"content-type": "multipart/form-data; boundary=B"}
    )


@pytest.fixture
def good(adapter_folder: Any) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in adapter_folder().iterdir()}


def test_names_everywhere(run: Any, open_site: Any, good: dict[str, bytes], tmp_path: Path) -> None:
    async def body() -> None:
        async with open_site(allow_path=(tmp_path / "adapters",)) as site:
            before = trace(tmp_path / "data")
            for name in HOSTILE:
                answers = [
                    await send(site, form(name, good)),
                    await site.post("/v1/adapters", name=name, source=str(tmp_path / "adapters" / "lora")),
                    await site.post(
                        "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / "adapters" / "lora")
                    ),
                ]
                assert [answer.status_code for answer in answers] == [400] * 3, (name, [a.text for a in answers])
                assert all(len(answer.text) < 1000 for answer in answers), "an answer is no echo of what was sent"
            assert trace(tmp_path / "data") == before
            assert site.engine.stats.resident == {}
            assert (await site.http.get("/v1/adapters")).json()["data"] == []

    run(body())


@pytest.mark.parametrize("verb", ["GET", "PATCH", "DELETE", "versions", "rollback", "load", "unload"])
def test_names_in_paths(run: Any, open_site: Any, verb: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            for name in (
                "a%00",
                "a%0a",
                "a,b",
                "%2e%2e",
                "..%2f..",
                "a%20b",
                "%D0%B0",
                "a" * 5000,
                "a@0",
                "a@",
                "@",
                "a@1@2",
            ):
                if verb.isupper():
                    response = await site.http.request(verb, f"/v1/adapters/{name}", json={"pinned": True})
                else:
                    method = "GET" if verb == "versions" else "POST"
                    response = await site.http.request(method, f"/v1/adapters/{name}/{verb}")
                assert response.status_code in {400, 404, 405}, (name, response.text)
                assert response.json()["error"]["message"]

    run(body())


def test_file_names(run: Any, open_site: Any, good: dict[str, bytes], tmp_path: Path) -> None:
    async def body() -> None:
        async with open_site() as site:
            before = trace(tmp_path / "data")
            names = (
                "..", "../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "a\\b.safetensors",
                "x.safetensors\x00",
                "x\x00.safetensors", "x\n.safetensors", "x,y.safetensors", "\N{CYRILLIC SMALL LETTER A}.safetensors",
                "x" * 5000 + ".safetensors", ".safetensors", "adapter_config.json ", "ADAPTER_CONFIG.JSON", "x.bin",
                "con.safetensors/", "x.safetensors.", "\N{RIGHT-TO-LEFT OVERRIDE}x.safetensors",
            )  # fmt: skip
            for name in names:
                response = await send(site, form("a", {**good, name: b"x"}))
                assert response.status_code == 400, (name, response.text)
                assert response.json()["error"]["param"] in {"files", None}
                assert len(response.text) < 1000
            assert trace(tmp_path / "data") == before

    run(body())


async def cut_short(site: Any, content: bytes) -> None:
    """An upload whose client is gone after half of it."""
    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=B")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/adapters", "raw_path": b"/v1/adapters", "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    messages = iter(
        [
            {"type": "http.request", "body": content[: len(content) // 2], "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def deliver(message: dict[str, Any]) -> None:
        assert message.get("status", 499) == 499

    await site.app(scope, receive, deliver)


def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    run: Any, open_site: Any, good: dict[str, bytes], tmp_path: Path
) -> None:
    async def body() -> None:
        async with open_site() as site:
            before = trace(tmp_path / "data")
            for _ in range(3):
                await cut_short(site, form("a", {**good, "more.safetensors": b"\x00" * (4 << 20)}))
            assert trace(tmp_path / "data") == before
            assert (await send(site, form("a", good))).status_code == 201

    run(body())


def test_a_name_deleted_while_its_next_version_arrives(
    run: Any, open_site: Any, good: dict[str, bytes], tmp_path: Path
) -> None:
    async def body() -> None:
        async with open_site() as site:
            assert (await send(site, form("a", good))).status_code == 201
            go = asyncio.Event()

            async def slow() -> AsyncIterator[bytes]:
                content = form("a", good)
                yield content[:100]
                await go.wait()
                yield content[100:]

            upload = asyncio.create_task(send(site, slow()))
            await asyncio.sleep(0.05)
            assert (await site.http.delete("/v1/adapters/a")).status_code == 200
            go.set()
            card = (await upload).json()
            assert card["version"] == 2, "numbers are never used twice"
            assert (await site.complete(model="a@2", max_tokens=1)).status_code == 200
            assert (await site.complete(model="a@1", max_tokens=1)).status_code == 404
            (blob,) = (tmp_path / "data" / "blobs").iterdir()
            assert blob.name == card["digest"]

    run(body())


@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "a", "source": 1}',
        b'{"name": ["a"], "source": "/x"}',
        b'{"name": "a"}',
        b'{"source": "/x"}',
        b'{"name": "a", "source": ""}',
        b'{"name": "a", "source": "' + b"x" * 5000 + b'"}',
        b'{"name": "a", "source": "hf://o/n", "revision": ""}',
        b'{"name": "a", "source": "hf://o/n", "revision": 1}',
        b'{"name": "a", "source": "hf://o/n", "pinned": true}',
        b'{"name": "\\ud800", "source": "hf://o/n"}',
        b'{"name": "a", "source": "\\ud800"}',
        b'{"name": "a", "source": "\\u0000"}',
        b'{"name": "a", "source": "file:///etc"}',
        b'{"name": "a", "source": "javascript:alert(1)"}',
        b'{"name": "a", "name": "../b", "source": "/etc"}',
        b"[" * 100_000,
        b"null",
        b"",
    ],
)
def test_bodies_that_name_no_source(run: Any, open_site: Any, content: bytes) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.http.post(
                "/v1/adapters", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 400, response.text
            assert "error" in json.loads(response.text)
            assert await asyncio.to_thread(site.server.loaded.store.registry.imports) == ()

    run(body())
