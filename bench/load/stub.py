"""A server that only keeps time: it streams tokens at known delays and notes when it wrote each of them.

What the client measures is held against it, and how much a client can take. ``GET /log`` has the notes: model -> times
at which its request came and each token was written, on the clock that time.perf_counter reads.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import httptools
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Stub:
    """first: seconds to the first token; gap: between tokens. By the request's own clock, so they add up exactly."""

    def __init__(self, first: float, gap: float) -> None:
        self.first = first
        self.gap = gap
        self.log: dict[str, list[float]] = {}

    def connection(self) -> StubConnection:
        return StubConnection(self)


class StubConnection(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._came = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._came = time.perf_counter()
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        url, body, self._url, self._body = self._url, self._body, b"", b""
        if url.endswith(b"completions"):
            self._stream(json.loads(body))
        else:
            self._answer(json.dumps(self._stub.log if url == b"/log" else {"data": [{"id": "base"}]}).encode())

    def _answer(self, body: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def _stream(self, body: dict[str, Any]) -> None:
        self._transport.write(_HEAD)
        times = self._stub.log[body["model"]] = [self._came]
        asyncio.get_running_loop().call_later(self._stub.first, self._token, int(body["max_tokens"]), times)

    def _token(self, tokens: int, times: list[float]) -> None:
        """Every token is due at a time of its own, however late the last one was."""
        if self._transport.is_closing():
            return
        now = time.perf_counter()
        times.append(now)
        self._transport.write(_event({"choices": [{"index": 0, "text": " token", "finish_reason": None}]}))
        done = len(times) - 1
        if done == tokens:
            usage = {"prompt_tokens": 1, "completion_tokens": tokens}
            self._transport.write(_event({"choices": [], "usage": usage}) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        due = times[0] + self._stub.first + done * self._stub.gap
        asyncio.get_running_loop().call_later(max(0.0, due - now), self._token, tokens, times)


def _event(event: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _serve(first: float, gap: float) -> None:
    server = await asyncio.get_running_loop().create_server(Stub(first, gap).connection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes it, or dies


def main(arguments: Sequence[str]) -> None:
    """FIRST and GAP in seconds. Prints its port. Ends with its standard input."""
    first, gap = map(float, arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(first, gap))


if __name__ == "__main__":
    main(sys.argv[1:])
