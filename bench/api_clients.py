"""Clients of `onebase bench api`: streams over plain sockets, read to their ends and counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

END = b"data: [DONE]\n\n"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "The fox is"}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}]}),
}


def main(arguments: Sequence[str]) -> None:
    """port, route, streams, tokens. Raises RuntimeError where a stream has fewer events than tokens."""
    port, route, streams, tokens = int(arguments[0]), arguments[1], int(arguments[2]), int(arguments[3])
    asyncio.run(_all(port, route, streams, tokens))


async def _all(port: int, route: str, streams: int, tokens: int) -> None:
    path, rest = BODIES[route]
    body = json.dumps({"model": "base", "stream": True, "max_tokens": tokens, **rest}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    counts = await asyncio.gather(*(_one(port, head.encode() + b"\r\n\r\n" + body) for _ in range(streams)))
    if min(counts) < tokens:
        raise RuntimeError(f"a stream ended after {min(counts)} events")


async def _one(port: int, request: bytes) -> int:
    """How many events came, the last one not counted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = b""
    while END not in answer[-100:]:
        part = await reader.read(1 << 16)
        if not part:
            raise RuntimeError(f"a stream broke off: {answer[-300:]!r}")
        answer += part
    writer.close()
    return answer.count(b"data: ") - 1
