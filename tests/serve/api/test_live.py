"""A real uvicorn in a thread and the real openai client: what the in-memory transport cannot show."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn

from onebase.serve.api.app import create_app


class Live:
    def __init__(self, app: Any, engine: Any) -> None:
        self.engine = engine
        self.state = app.state.server
        self.http = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none"))
        self.thread = threading.Thread(target=self.http.run, daemon=True)

    @property
    def port(self) -> int:
        return int(self.http.servers[0].sockets[0].getsockname()[1])

    def __enter__(self) -> Live:
        ready = threading.Event()
        self.state.on_ready.append(ready.set)
        self.thread.start()
        assert ready.wait(30)
        while not self.http.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *args: object) -> None:
        self.http.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def live(settings_for: Any, engine: Any) -> Iterator[Live]:
    settings = settings_for(api_key="user", admin_key="root")
    with Live(create_app(settings, engine), engine) as running:
        yield running
    assert engine.stopped


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{live.port}/v1", api_key="user", max_retries=0) as made:
        yield made


MESSAGES: Any = [{"role": "user", "content": "hello 😀"}]


def test_openai_client_plain_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=40, seed=1)
    text = whole.choices[0].message.content
    assert text is not None
    assert "😀" in text
    stream = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage == whole.usage
    completion = client.completions.create(model="base", prompt=["a", "b"], max_tokens=3, n=2, extra_body={"top_k": 5})
    assert [choice.text for choice in completion.choices] == ["aaa", "aaa", "bbb", "bbb"]
    assert [model.id for model in client.models.list()] == ["base"]


def test_openai_client_errors(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="base", prompt="x", suffix="y")
    assert refused.value.param == "suffix"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    live.engine.die_after = 2
    with pytest.raises(openai.APIError, match="died"):
        list(client.completions.create(model="base", prompt="x", stream=True))
    with pytest.raises(openai.InternalServerError) as dead:
        client.completions.create(model="base", prompt="x")
    assert dead.value.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_socket_aborts(live: Live, replies: Any, stream: bool) -> None:
    live.engine.reply, live.engine.delay = replies([70] * 100_000, "length"), 0.01
    body = json.dumps({"model": "base", "prompt": "x", "max_tokens": 250, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer user\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        deadline = time.monotonic() + 10
        while not live.engine.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not stream or raw.recv(10)
    while not live.engine.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live.engine.aborted == [live.engine.requests[0].id]


def test_tokens_arrive_as_they_are_made(client: openai.OpenAI, live: Live) -> None:
    live.engine.delay = 0.05
    times = [time.monotonic() for _ in client.completions.create(model="base", prompt="x", stream=True, max_tokens=8)]
    assert times[-1] - times[0] > 0.2


def test_many_clients_at_once(live: Live) -> None:
    async def calls() -> list[str]:
        url = f"http://127.0.0.1:{live.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="user", max_retries=0) as made:
            letters = "abcdefgh" * 4
            work = [made.completions.create(model="base", prompt=letter, max_tokens=3) for letter in letters]
            return [answer.choices[0].text for answer in await asyncio.gather(*work)]

    assert asyncio.run(calls()) == [letter * 3 for letter in "abcdefgh" * 4]
