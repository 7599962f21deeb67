"""`onebase bench mixed`: the real server under a closed loop of HTTP clients, beside transformers and PEFT."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onebase.bench import http_loop
from onebase.bench.http_loop import Answer, Call, HttpRun
from onebase.bench.http_server import Server
from onebase.bench.mixed import Plan, run
from onebase.bench.workload import Load

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_sides_over_http_generate_all_their_tokens(tmp_path: Path) -> None:
    plan = Plan(Load(4, 8, 4), clients=2, num_adapters=2, rounds=1, http=True, shape="tiny")
    run(plan, tmp_path / "mixed.json")
    stored = json.loads((tmp_path / "mixed.json").read_text())
    assert set(stored["tokens_per_second"]) == {"ours, base", "generate, base", "ours, adapters", "PEFT, adapters"}
    assert all(rate > 0 for rates in stored["tokens_per_second"].values() for rate in rates)
    assert all(name in stored["rows"]["ours, adapters, cores busy"] for name in ("API", "engine", "client"))


def ask(answer: Callable[[asyncio.StreamWriter], None]) -> list[Answer]:
    """What a client makes of a server that answers so, whatever it is asked."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            answer(writer)
            await writer.drain()
        writer.close()

    async def both() -> list[Answer]:
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()[:2]
            process: subprocess.Popen[str] = subprocess.Popen.__new__(subprocess.Popen)
            process._child_created = False  # type: ignore[attr-defined]  # never started: its end is not waited for
            calls = [Call("base", (1, 2), 3)] * 2
            return await http_loop._run(Server(host, port, process), calls, 1)

    return asyncio.run(both())


def chunked(*texts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(text), text) for text in texts) + b"0\r\n\r\n"


def test_a_stream_ends_where_it_says_so_and_its_tokens_are_counted() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
    answers = ask(lambda writer: writer.write(HEAD + chunked(b'data: {"text":"0"}\n\n', usage)))
    assert [answer.tokens for answer in answers] == [3, 3]
    assert all(answer.arrivals and answer.arrivals[0] >= answer.sent for answer in answers)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "503"),
        (HEAD + chunked(b'data: {"usage":{"completion_tokens":2}}\n\n'), "2 tokens came, 3 were asked for"),
        (HEAD + chunked(b'data: {"error":{}}\n\n'), "0 tokens came"),
    ],
)
def test_anything_but_a_whole_stream_is_an_error(answer: bytes, message: str) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        ask(lambda writer: writer.write(answer))
    assert message in str(caught.value.exceptions[0])


def test_latencies_are_between_pieces_of_text() -> None:
    """The last piece ends the stream, and is no token."""
    answers = (Answer(0.0, [1.0, 1.5, 2.0, 2.9]), Answer(1.0, [4.0, 4.5, 9.0]))
    figures = HttpRun(9.0, 5, answers, {})
    assert figures.ttft(50) == pytest.approx(2.0)
    assert figures.gap(100) == pytest.approx(0.5)
