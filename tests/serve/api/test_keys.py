"""Keys, and what a web page may do to a server without any."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

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
            for method, path in (
                ("GET", "/v1/adapters/a/versions"),
                ("PATCH", "/v1/adapters/a"),
                ("DELETE", "/v1/adapters/a"),
                ("POST", "/v1/adapters/a/rollback"),
                ("POST", "/v1/adapters/a/load"),
                ("POST", "/v1/adapters/a/unload"),
            ):
                options = {"json": {"pinned": True}} if method == "PATCH" else {}
                status = (await site.http.request(method, path, **options)).status_code
                assert status == (404 if admin == 200 else admin), path
            assert (await site.post("/v1/registry/gc", dry_run=True)).status_code == admin
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
            assert (await site.upload("a", folder, origin="https://evil.example")).status_code == 403
            assert (await site.upload("a", folder, origin="null")).status_code == 403
            assert (await site.upload("a", folder, origin="http://localhost")).status_code == 201

    run(body())
