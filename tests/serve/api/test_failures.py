"""What clients see when the engine is starting, refuses, dies; and that nobody's work goes on when nobody listens."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from onebase.adapters.errors import (
    AdapterNotFound,
    AdapterRejected,
    EngineDead,
    ModelRejected,
    RequestRejected,
)


def test_health_answers_and_ready_waits_while_starting(run: Any, open_site: Any, engine: Any) -> None:
    async def body() -> None:
        engine.gate = asyncio.Event()
        async with open_site(wait=False) as site:
            assert (await site.http.get("/health")).status_code == 200
            assert (await site.http.get("/metrics")).status_code == 200
            for response in (await site.http.get("/ready"), await site.complete(), await site.http.get("/v1/models")):
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) > 0
                assert response.json()["error"]["code"] == "not_ready"
            engine.gate.set()
            await site.settled()
            assert (await site.http.get("/ready")).status_code == 200
        assert engine.stopped

    run(body())


def test_a_refused_base_model_is_told_to_the_runner(run: Any, open_site: Any, engine: Any) -> None:
    async def body() -> None:
        engine.start_failure = ModelRejected("bloom passes alibi in the mask")
        async with open_site(wait=False) as site:
            await site.settled()
            assert site.server.failure == "bloom passes alibi in the mask"
            assert (await site.http.get("/health")).status_code == 200
            assert "alibi" in (await site.http.get("/ready")).json()["error"]["message"]
        assert engine.stopped

    run(body())


def test_stopping_while_starting_does_not_hang(run: Any, open_site: Any, engine: Any) -> None:
    async def body() -> None:
        engine.gate = asyncio.Event()
        async with open_site(wait=False):
            await asyncio.sleep(0)
        assert engine.stopped

    run(body())


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (EngineDead("gone"), 503),
        (RequestRejected("too long", param="prompt"), 400),
        (AdapterRejected("bad rank"), 400),
        (AdapterNotFound("no blob"), 404),
    ],
)
def test_failures_before_the_first_token_have_their_status(
    run: Any, open_site: Any, failure: Exception, status: int
) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.failure = failure
            for stream in (False, True):
                for n in (1, 3):
                    response = await site.complete(stream=stream, n=n)
                    assert response.status_code == status
                    assert response.json()["error"]["message"] == str(failure)
                    assert ("retry-after" in response.headers) is (status == 503)

    run(body())


@pytest.mark.parametrize("n", [1, 3])
def test_death_in_mid_stream_is_an_error_line_and_no_done(run: Any, open_site: Any, n: int) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.die_after = 3
            response = await site.complete(stream=True, max_tokens=10, n=n)
            assert response.status_code == 200
            lines = [line for line in response.text.split("\n\n") if line]
            last = json.loads(lines[-1].removeprefix("data: "))
            assert last["error"]["code"] == "engine_dead"
            assert all("error" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])
            assert (await site.complete()).status_code == 503
            assert (await site.http.get("/health")).status_code == 200
            assert (await site.http.get("/v1/models")).status_code == 200

    run(body())


def test_one_failing_choice_aborts_its_siblings(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            forever = replies([70] * 1000, "length")

            def reply(request: Any) -> Any:
                if request.prompt == tuple(site.encode("x")):
                    raise RequestRejected("no x")
                return forever(request)

            site.engine.reply, site.engine.delay = reply, 0.001
            response = await site.complete(prompt=["a", "x", "b"], max_tokens=100)
            assert response.status_code == 400
            assert {r.prompt for r in site.engine.requests if r.id in site.engine.aborted} >= {
                tuple(site.encode("a")),
                tuple(site.encode("b")),
            }

    run(body())


async def call_and_leave(
    site: Any, after: int, *, path: str = "/v1/completions", **options: Any
) -> list[dict[str, Any]]:
    """Speaks ASGI: sends a body, then disconnects once ``after`` messages have come back."""
    sent: list[dict[str, Any]] = []
    left = asyncio.Event()
    asked = {"prompt": "x"} if path == "/v1/completions" else {}
    body = json.dumps({"model": "base", **asked, **options}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) >= after:
            left.set()

    if after == 0:
        asyncio.get_running_loop().call_later(0.1, left.set)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await site.app(scope, receive, send)
    return sent


@pytest.mark.parametrize(("after", "stream"), [(0, False), (0, True), (3, True)])
@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_leaves_aborts_its_sequences(
    run: Any, open_site: Any, replies: Any, after: int, stream: bool, n: int
) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = replies([70] * 100_000, "length")
            site.engine.delay = 10 if after == 0 else 0.001
            await asyncio.wait_for(call_and_leave(site, after, stream=stream, n=n, max_tokens=100), 60)
            assert len(site.engine.requests) == n
            assert sorted(site.engine.aborted) == sorted(r.id for r in site.engine.requests)
            admission = site.server.admission
            assert (admission.sequences.taken, admission.tokens.taken) == (0, 0)
            text = (await site.http.get("/metrics")).text
            assert 'onebase_request_errors_total{model="base",kind="client_closed"} 1' in text

    run(body())


CHAT = {"messages": [{"role": "user", "content": "x"}]}
OBJECT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("path", "options", "slow"),
    [
        ("/v1/completions", OBJECT, "grammar"),
        ("/v1/chat/completions", CHAT | OBJECT, "grammar"),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_object"}}}, "grammar"),
        ("/v1/chat/completions", CHAT, "template"),
        ("/v1/responses", {"input": "x"}, "template"),
        ("/tokenize", CHAT, "template"),
    ],
)
def test_a_client_that_leaves_while_its_request_is_prepared_ends_it(
    run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch, path: str, options: dict[str, Any], slow: str
) -> None:
    async def body() -> None:
        async with open_site() as site:
            ended = asyncio.Event()

            async def endless(*_: Any) -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()

            if slow == "grammar":
                monkeypatch.setattr(site.server.grammars, "checked", endless)
            else:
                monkeypatch.setattr(site.server.loaded.workers.renderer, "render", endless)
            await asyncio.wait_for(call_and_leave(site, 0, path=path, **options), 30)
            assert ended.is_set()
            assert not site.engine.requests
            assert (site.server.admission.sequences.taken, site.server.admission.tokens.taken) == (0, 0)

    run(body())


def test_slow_uploads_hold_up_no_request(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.upload("a", adapter_folder())
            go, loop = threading.Event(), asyncio.get_running_loop()
            busy = [loop.run_in_executor(None, go.wait) for _ in range(100)]  # as uploads that are being checked
            try:
                async with asyncio.timeout(10):
                    assert (await site.complete(model="a", max_tokens=1)).status_code == 200
                    assert (await site.http.get("/v1/adapters")).status_code == 200
                    assert (await site.http.post("/v1/adapters/a/rollback")).status_code == 404
            finally:
                go.set()
                await asyncio.gather(*busy)

    run(body())
