"""The client against servers that behave, and servers that do not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from onebase.bench.load.client import Client
from onebase.bench.load.driver import Driver
from onebase.bench.load.http import Address, Pool
from onebase.bench.load.requests import Target
from onebase.bench.load.result import RequestRecord
from onebase.bench.load.worker import Progress
from onebase.bench.load.workload import Piece, Planned

Reply = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(text: str) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text.encode())


def event(body: object) -> bytes:
    return chunk(f"data: {json.dumps(body)}\n\n")


def piece(text: str) -> bytes:
    return event({"choices": [{"index": 0, "text": text}], "usage": None})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}})
DONE = chunk("data: [DONE]\n\n")
WHOLE = HEAD + piece("a") + piece("") + piece("b") + USAGE + DONE + END


class Odd:
    """Answers by the model that is asked for. requests: heads and bodies that came; connections: how many."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self._replies = replies
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.requests.append((head, body))
                await self._replies[body["model"]](body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def sends(data: bytes, *, close: bool = False) -> Reply:
    async def reply(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return reply


def planned(model: str, number: int = 0, **changes: Any) -> Planned:
    shown: dict[str, Any] = {
        "at": 0.0,
        "tenant": 0,
        "tokens_in": 4,
        "tokens_out": 7,
        "prefix": (),
        "cancel_after": None,
    }
    return Planned(number=number, model=model, seed=number, **shown | changes)


async def _sent(
    odd: Odd, plan: list[Planned], progress: Progress, clients: int, target: dict[str, Any]
) -> list[RequestRecord]:
    server = await asyncio.start_server(odd.serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        start = time.perf_counter()
        pool = Pool(Address.parse(url))
        client = Client(Target(**{"url": url, "vocabulary": 100} | target), ("", "second"), start, progress, pool)
        driver = Driver(client, start)
        records = await (driver.closed_loop(plan, clients) if clients else driver.open_loop(plan))
        pool.close()
        await asyncio.sleep(0)
    return records


def sent(
    odd: Odd, *plan: Planned, progress: Progress | None = None, clients: int = 0, **target: Any
) -> list[RequestRecord]:
    return asyncio.run(
        _sent(odd, list(plan), progress or Progress(), clients, {"keys": ("", "key-of-second")} | target)
    )


def one(data: bytes, *, close: bool = False, **changes: Any) -> RequestRecord:
    (record,) = sent(Odd({"m": sends(data, close=close)}), planned("m", **changes), timeout=5.0)
    return record


def test_a_stream_is_counted_as_the_server_counts() -> None:
    record = one(WHOLE)
    assert (record.status, record.error) == ("ok", None)
    assert (record.tokens_in, record.tokens_out) == (11, 7)
    assert len(record.gaps) == 1  # the piece without text is none
    assert record.ttft is not None


def test_streams_without_usage_are_counted_by_piece() -> None:
    record = one(HEAD + piece("a") + piece("b") + DONE + END)
    assert (record.tokens_in, record.tokens_out) == (4, 2)


def test_chat_deltas_are_text_where_they_have_content() -> None:
    deltas = [{"role": "assistant"}, {"content": ""}, {"reasoning_content": "hm"}, {"content": "a"}, {}]
    body = b"".join(event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas)
    odd = Odd({"m": sends(HEAD + body + DONE + END)})
    (record,) = sent(odd, planned("m"), endpoint="chat")
    assert len(record.gaps) == 1
    head, asked = odd.requests[0]
    assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    assert len(asked["messages"][0]["content"].split()) == 4


def test_events_may_be_cut_anywhere_and_end_in_either_way() -> None:
    async def drip(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        lines = ['data:{"choices":[{"text":"a"}]}', ": ping", 'data: {"choices":[{"text":"b"}]}', "data: [DONE]"]
        text = "".join(f"{line}\r\n\r\n" for line in lines)
        writer.write(HEAD)
        for letter in text:
            writer.write(chunk(letter))
            await writer.drain()
        writer.write(END)

    (record,) = sent(Odd({"m": drip}), planned("m"))
    assert (record.status, len(record.gaps)) == ("ok", 1)


@pytest.mark.parametrize(("status", "kind"), [(429, "rejected"), (503, "rejected"), (400, "failed"), (500, "failed")])
def test_refusals_are_offered_requests(status: int, kind: str) -> None:
    record = one(b"HTTP/1.1 %d No\r\nContent-Length: 4\r\n\r\nbusy" % status)
    assert (record.status, record.error) == (kind, f"{status}: busy")
    assert (record.first, record.tokens_out) == (None, 0)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (HEAD + piece("a"), "the server closed the connection"),
        (b"", "the server closed the connection"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
        (HEAD + piece("a") + event({"error": {"message": "out of pages"}}) + END, "out of pages"),
        (HEAD + chunk("data: {not json\n\n") + END, "an event that is none"),
        (HEAD + chunk('data: {"choices": 3}\n\n') + END, "an event that is none"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "did not stream"),
    ],
)
def test_broken_answers_are_failures_with_a_reason(data: bytes, told: str) -> None:
    record = one(data, close=True)
    assert record.status == "failed"
    assert told in (record.error or "")


def test_a_line_without_end_is_a_failure_and_takes_no_memory() -> None:
    async def flood(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(70):
            writer.write(chunk("x" * (1 << 16)))
            await writer.drain()
        writer.write(END)

    (record,) = sent(Odd({"m": flood}), planned("m"))
    assert "a line of more than" in (record.error or "")


def test_nobody_listens() -> None:
    async def send() -> RequestRecord:
        pool = Pool(Address.parse("http://127.0.0.1:1"))
        client = Client(Target("http://127.0.0.1:1"), ("",), time.perf_counter(), Progress(), pool)
        return await client.send(planned("m"), client.encode(planned("m")), 0.0)

    record = asyncio.run(send())
    assert record.status == "failed"
    assert "Connect" in (record.error or "")


def test_a_request_has_a_time_limit() -> None:
    async def never(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + piece("a"))
        await asyncio.sleep(0.3)

    (record,) = sent(Odd({"m": never}), planned("m"), timeout=0.1)
    assert (record.status, record.error) == ("failed", "no end within 0.1 s")


def test_cancelled_requests_close_their_connection_after_so_many_pieces() -> None:
    closed = asyncio.Event()

    async def endless(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        try:
            while True:
                writer.write(piece("a"))
                await writer.drain()
                await asyncio.sleep(0.001)
        except ConnectionError:
            closed.set()

    (record,) = sent(Odd({"m": endless}), planned("m", cancel_after=3))
    assert record.status == "cancelled"
    assert record.tokens_out >= 3


def test_connections_are_kept_and_those_closed_meanwhile_are_replaced() -> None:
    kept = Odd({"m": sends(WHOLE)})
    assert [one.status for one in sent(kept, *(planned("m", i) for i in range(6)), clients=2)] == ["ok"] * 6
    assert kept.connections == 2
    stale = Odd({"m": sends(WHOLE, close=True)})
    assert [one.status for one in sent(stale, *(planned("m", i) for i in range(6)), clients=1)] == ["ok"] * 6
    assert stale.connections == 6


def test_tenants_send_their_keys() -> None:
    odd = Odd({"m": sends(WHOLE)})
    records = sent(odd, planned("m"), planned("m", 1, tenant=1))
    assert {record.tenant for record in records} == {"", "second"}
    assert sorted("Bearer key-of-second" in head for head, _ in odd.requests) == [False, True]


def test_bodies_ask_for_what_was_planned() -> None:
    odd = Odd({"m": sends(WHOLE)})
    sent(odd, planned("m", prefix=(Piece(1, 2),)), planned("m", 1, prefix=(Piece(1, 2),)), clients=1)
    first, second = (body for _, body in odd.requests)
    assert first["max_tokens"] == 7
    assert first["ignore_eos"] is True
    assert first["stream_options"] == {"include_usage": True}
    assert len(first["prompt"]) == 4
    assert first["prompt"][:2] == second["prompt"][:2]
    assert first["prompt"] != second["prompt"]


def test_open_loops_do_not_wait_for_answers() -> None:
    """The first request is answered only when the second one has come."""
    second = asyncio.Event()

    async def waits(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await second.wait()
        writer.write(WHOLE)

    async def tells(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        second.set()
        writer.write(WHOLE)

    records = sent(Odd({"a": waits, "b": tells}), planned("a"), planned("b", 1, at=0.05), timeout=20.0)
    assert [record.status for record in records] == ["ok", "ok"]
    assert all(record.sent >= record.at for record in records)


def test_what_is_under_way_is_counted() -> None:
    progress = Progress()
    odd = Odd({"m": sends(WHOLE), "busy": sends(b"HTTP/1.1 429 No\r\nContent-Length: 4\r\n\r\nbusy")})
    sent(odd, planned("m"), planned("busy", 1), progress=progress)
    assert (progress.sent, progress.ok, progress.rejected, progress.tokens) == (2, 1, 1, 7)
    assert len(progress.first) == 1
    assert progress.last_error == "429: busy"


def test_a_stopped_driver_breaks_off_what_is_under_way() -> None:
    async def never(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + piece("a"))
        await writer.drain()
        await asyncio.sleep(30)

    async def stopped() -> list[RequestRecord]:
        server = await asyncio.start_server(Odd({"m": never}).serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        progress, start = Progress(), time.perf_counter()
        driver = Driver(Client(Target(url), ("",), start, progress, Pool(Address.parse(url))), start)
        running = asyncio.ensure_future(driver.open_loop([planned("m"), planned("m", 1, at=1000.0)]))
        while not progress.first:
            await asyncio.sleep(0.005)
        driver.stop()
        records = await running
        server.close()
        return records

    (record,) = asyncio.run(stopped())
    assert (record.status, record.error) == ("cancelled", "the run was stopped")


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://h", "h", 80, ""),
        ("https://h/v1/", "h", 443, ""),
        ("http://[::1]:9/openai/v1", "::1", 9, "/openai"),
    ],
)
def test_addresses(url: str, host: str, port: int, prefix: str) -> None:
    found = Address.parse(url)
    assert (found.host, found.port, found.prefix) == (host, port, prefix)


@pytest.mark.parametrize("url", ["h:80", "ftp://h", "http://", "http://h:x", "http://h?a=1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url: "):
        Address.parse(url)
