"""An open server of one machine answers to that machine's names only: a web page may rebind its own to 127.0.0.1."""

from __future__ import annotations

from typing import Any

import pytest

OTHERS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.1"]
OTHERS += ["[::2]", "localhost@evil.example", "[::1", "", "localhost:80:80", "0.0.0.0"]
PATHS = ("/health", "/metrics", "/v1/models", "/v1/adapters", "/docs", "/openapi.json")
NO_ROUTES = ("/", "/v1/adapters/", "/docs/", "/nothing")


@pytest.mark.parametrize("host", OTHERS)
def test_without_keys_names_that_were_made_to_resolve_here_are_refused(run: Any, open_site: Any, host: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            answers = [await site.http.get(path, headers={"host": host}) for path in (*PATHS, *NO_ROUTES)]
            headers = {"host": host, "origin": f"http://{host}"}
            answers.append(await site.http.post("/v1/adapters/a/unload", headers=headers))
            json_body = {"model": "base", "prompt": "x"}
            answers.append(await site.http.post("/v1/completions", json=json_body, headers={"host": host}))
            for answer in answers:
                assert answer.status_code == 403, answer.text
                assert answer.json()["error"]["code"] == "host_not_allowed"
            assert not site.engine.requests

    run(body())


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_without_keys_every_name_of_the_machine_itself_is_served(run: Any, open_site: Any, host: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            for path in PATHS:
                assert (await site.http.get(path, headers={"host": host})).status_code == 200

    run(body())


def test_no_slash_is_added_or_taken_off(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for path in NO_ROUTES:
                answer = await site.http.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")

    run(body())


def test_what_is_refused_has_an_id_and_is_counted(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            answer = await site.http.get("/docs", headers={"host": "evil.example", "x-request-id": "mine"})
            assert answer.headers["x-request-id"] == "mine"
            text = (await site.http.get("/metrics")).text
            assert 'onebase_http_requests_total{route="unmatched",status="403"} 1.0' in text

    run(body())


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"api_key": "user"}, 200),
        ({"admin_key": "root"}, 403),
        ({"insecure": True}, 200),
        ({"insecure": True, "host": "0.0.0.0"}, 200),
        ({"host": "::1"}, 403),
        ({"host": "localhost"}, 403),
    ],
)
def test_the_host_matters_only_to_an_open_server_of_this_machine(
    run: Any, open_site: Any, options: dict[str, Any], status: int
) -> None:
    async def body() -> None:
        async with open_site(**options) as site:
            headers = {"host": "proxy.example", "authorization": "Bearer user"}
            assert (await site.http.get("/v1/models", headers=headers)).status_code == status

    run(body())
