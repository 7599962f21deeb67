"""A closed loop of streaming HTTP clients that costs little: it shares the processors with the server it measures.

Each client is one kept connection. Chunks are not parsed as they come: their times are kept, and the end of a stream
tells how many tokens it had.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onebase.bench.http_server import Server
from onebase.bench.ours import Run

_END_OF_BODY = b"\r\n0\r\n\r\n"  # of a chunked one, whose chunks here end in a line of their own
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True, slots=True)
class Call:
    """A completion to ask for: exactly ``tokens_out`` tokens after the prompt's ids."""

    model: str
    prompt: Sequence[int]
    tokens_out: int

    def encode(self, server: Server) -> bytes:
        """The whole request."""
        fields = {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.tokens_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Answer:
    """sent: when, in seconds; arrivals: when each piece came. A step's token may share a piece with the next one's."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class HttpRun(Run):
    """cpu: seconds of each process that had a part in it, this one's as ``client``."""

    answers: tuple[Answer, ...]
    cpu: Mapping[str, float]

    def ttft(self, percent: float) -> float:
        """Percentile of the time to the first piece, in seconds."""
        return float(np.percentile([answer.arrivals[0] - answer.sent for answer in self.answers], percent))

    def gap(self, percent: float) -> float:
        """Percentile of the time between pieces, in seconds."""
        pairs = (pair for answer in self.answers for pair in itertools.pairwise(answer.arrivals[:-1]))
        return float(np.percentile([later - earlier for earlier, later in pairs], percent))


def closed_loop(server: Server, calls: Sequence[Call], clients: int) -> HttpRun:
    """``clients`` clients, each sending its next request when its last one is done.

    Raises RuntimeError for any answer but a whole stream of as many tokens as were asked for.
    """
    cpu, own, start = server.cpu_seconds(), time.process_time(), time.perf_counter()
    answers = asyncio.run(_run(server, calls, clients))
    seconds = time.perf_counter() - start
    spent = {name: now - cpu[name] for name, now in server.cpu_seconds().items()}
    spent["client"] = time.process_time() - own
    return HttpRun(seconds, sum(answer.tokens for answer in answers), tuple(answers), spent)


async def _run(server: Server, calls: Sequence[Call], clients: int) -> list[Answer]:
    left = deque((call, call.encode(server)) for call in calls)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_client(server, left)) for _ in range(min(clients, len(calls)))]
    return [answer for task in tasks for answer in task.result()]


async def _client(server: Server, left: deque[tuple[Call, bytes]]) -> list[Answer]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        answers = []
        while left:
            call, request = left.popleft()
            answer = Answer(time.perf_counter())
            writer.write(request)
            body = await _read(reader, answer)
            answer.tokens = _checked(body, call)
            answers.append(answer)
        return answers
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, answer: Answer) -> bytes:
    """All of one response. One that is not a stream ends with what has come at once: it is an error."""
    body = bytearray()
    while not body.endswith(_END_OF_BODY):
        data = await reader.read(1 << 16)
        body += data
        if not data or not body.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {bytes(body[-2000:])!r}")
        if b"data: " in data:
            answer.arrivals.append(time.perf_counter())
    return bytes(body)


def _checked(body: bytes, call: Call) -> int:
    found = _TOKENS.search(body, body.rfind(b'"usage":{'))
    tokens = 0 if found is None else int(found.group(1))
    if tokens != call.tokens_out:
        raise RuntimeError(f"{tokens} tokens came, {call.tokens_out} were asked for: {body[-2000:]!r}")
    return tokens
