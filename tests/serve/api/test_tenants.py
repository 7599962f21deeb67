"""Tenants over HTTP: their keys, limits and priorities, what they are counted for, and what the engine is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from onebase.adapters.errors import RequestTimedOut
from onebase.serve.api.tenancy import owned
from onebase.serve.config import Settings
from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.tenants import NOBODY, Tenant, read_keys

BLUE, GREEN, SECOND = ("blue-key-0123456789", "green-key-0123456789", "green-other-key-0123")
FILE = f"""
[[tenant]]
name = "blue"
keys = ["{BLUE}"]
weight = 2.5
max_inflight_seqs = 2
max_inflight_tokens = 9
priority = 1

[[tenant]]
name = "green"
keys = ["{GREEN}", "{SECOND}"]
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return path


def _as(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def _complete(site: Any, key: str, **body: Any) -> Any:
    body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 2, **body}
    return await site.http.post("/v1/completions", json=body, headers=_as(key))


def test_a_key_says_whose_a_request_is(run: Any, open_site: Any, keys: Path) -> None:
    async def body() -> None:
        async with open_site(keys=keys, api_key="the-servers-own", admin_key="root") as site:
            for key in (BLUE, GREEN, SECOND, "the-servers-own", "root"):
                assert (await _complete(site, key)).status_code == 200, key
            assert [one.tenant for one in site.engine.requests] == ["blue", "green", "green", "", ""]
            for key in ("", "wrong", BLUE[:-1], BLUE + "x", "blue"):
                assert (await _complete(site, key)).status_code == 401, key

    run(body())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 16}),
    ],
)
def test_every_generating_route_knows_the_tenant(
    run: Any, open_site: Any, keys: Path, path: str, body: dict[str, Any]
) -> None:
    """The engine is told whose the request is, and the tenant's usage counts it."""

    async def work() -> None:
        async with open_site(keys=keys, admin_key="root") as site:
            answer = await site.http.post(path, json={"model": "base", **body}, headers=_as(GREEN))
            assert answer.status_code == 200, answer.text
            assert [one.tenant for one in site.engine.requests] == ["green"]
            assert 'onebase_tenant_requests_total{tenant="green"} 1.0' in (await site.http.get("/metrics")).text

    run(work())


def test_a_tenants_key_opens_no_admin_route(run: Any, open_site: Any, keys: Path) -> None:
    async def body() -> None:
        async with open_site(keys=keys, admin_key="root") as site:
            response = await site.http.get("/v1/adapters", headers=_as(BLUE))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_key_required")
            assert (await site.http.get("/v1/adapters", headers=_as("root"))).status_code == 200
            assert (await site.http.get("/v1/models", headers=_as(BLUE))).status_code == 200
            assert (await site.http.get("/v1/models")).status_code == 401

    run(body())


def test_a_tenants_limits_are_its_own(run: Any, open_site: Any, keys: Path) -> None:
    async def body() -> None:
        async with open_site(keys=keys, admin_key="root") as site:
            site.engine.pause = asyncio.Event()
            first = asyncio.create_task(_complete(site, BLUE, n=2))
            while len(site.engine.requests) < 2:
                await asyncio.sleep(0.001)
            full = await _complete(site, BLUE)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
            assert "max_inflight_seqs of the tenant blue" in full.json()["error"]["message"]
            others = asyncio.create_task(_complete(site, GREEN, n=3))
            while len(site.engine.requests) < 5:
                await asyncio.sleep(0.001)
            site.engine.pause.set()
            assert (await first).status_code == (await others).status_code == 200
            assert (await _complete(site, BLUE, prompt=[5] * 10)).status_code == 400, "over its tokens, alone"
            assert (await _complete(site, BLUE, n=2)).status_code == 200, "what it had comes back"
            assert site.server.admission.sequences.taken == site.server.admission.tokens.taken == 0

    run(body())


def test_nobody_is_more_urgent_than_its_key_allows() -> None:
    asked = Request("r", (1,), SamplingParams(), priority=-3)
    assert owned(asked, Tenant("blue", priority=1)).priority == 1
    assert owned(replace(asked, priority=4), Tenant("blue", priority=1)).priority == 4
    assert owned(asked, NOBODY) == asked


def test_what_a_tenant_uses_is_counted_and_logged(run: Any, open_site: Any, keys: Path) -> None:
    async def body() -> None:
        async with open_site(keys=keys, api_key="the-servers-own", admin_key="root") as site:
            with capture_logs() as logs:
                for key in (GREEN, SECOND, "the-servers-own"):
                    assert (await _complete(site, key)).status_code == 200
                assert (await _complete(site, GREEN, stream=True)).status_code == 200
            assert [line.get("tenant") for line in logs if line["event"] == "request"] == ["green"] * 2 + [
                None,
                "green",
            ]
            lines = (await site.http.get("/metrics")).text.splitlines()
            assert 'onebase_tenant_requests_total{tenant="green"} 3.0' in lines
            assert 'onebase_tenant_prompt_tokens_total{tenant="green"} 9.0' in lines
            assert 'onebase_tenant_generated_tokens_total{tenant="green"} 6.0' in lines
            assert 'onebase_tenant_requests_total{tenant="none"} 1.0' in lines
            assert not any(key in line for line in lines for key in (GREEN, SECOND))

    run(body())


def test_a_timeout_is_408_and_not_tried_again(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.failure = RequestTimedOut("the request did not end within its timeout of 2 s", param="timeout")
            answer = await site.complete()
            assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "false")
            error = answer.json()["error"]
            assert (error["code"], error["param"], error["type"]) == ("timeout", "timeout", "invalid_request_error")

    run(body())


# The file


def test_the_file_says_weights_and_limits(keys: Path) -> None:
    keyring = read_keys(keys)
    assert keyring.tenants == (Tenant("blue", 2.5, 2, 9, 1), Tenant("green", priority=0))
    assert keyring.owner(SECOND.encode()) == keyring.tenants[1]
    assert keyring.owner(b"") is None
    settings = Settings(model="m", keys=keys, admin_key="root")
    assert settings.engine_config().tenant_weights == (("blue", 2.5), ("green", 1.0))
    assert Settings(model="m").engine_config().tenant_weights == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "tenant"),
        ("[[tenant]]\nname = 'a'", "tenant.0.keys"),
        (f"[[tenant]]\nname = 'a b'\nkeys = ['{BLUE}']", "tenant.0.name"),
        (f"[[tenant]]\nname = 'a'\nkeys = ['{BLUE}']\nwieght = 2", "tenant.0.wieght"),
        (f"[[tenant]]\nname = 'a'\nkeys = ['{BLUE}']\nweight = 0", "tenant.0.weight"),
        (f"[[tenant]]\nname = 'a'\nkeys = ['{BLUE}']\nweight = nan", "tenant.0.weight"),
        ("[[tenant]]\nname = 'a'\nkeys = ['short']", "16 to 256"),
        (f"[[tenant]]\nname = 'a'\nkeys = ['{BLUE}', '{BLUE}']", "given twice"),
        (FILE + FILE, "two tenants have this name"),
        (FILE + f"[[tenant]]\nname = 'red'\nkeys = ['{BLUE}']", "given twice"),
        ("[[tenant", "keys.toml"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_without_keys(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--keys") as error:
        read_keys(path)
    assert told in str(error.value)
    assert BLUE not in str(error.value)


def test_tenants_need_somebody_who_administers(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--admin-key"):
        Settings(model="m", keys=keys)
    with pytest.raises(ValueError, match="--keys"):
        Settings(model="m", keys=tmp_path / "missing.toml", admin_key="root")
    assert Settings(model="m", keys=keys, admin_key="root", host="0.0.0.0")
