"""HTTP/1.1 as a load client needs it: kept connections, bodies handed on as they come, little work a piece.

httptools parses; the clock is read once for each read of a socket, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

CONNECT_SECONDS = 30.0


class ConnectionLost(ConnectionError):
    """The server closed before the answer was whole. unused: it had sent nothing of it."""

    def __init__(self, message: str, unused: bool) -> None:
        super().__init__(message)
        self.unused = unused


class Sink(Protocol):
    """Takes one answer."""

    def sent(self, now: float) -> None:
        """The request is written to its connection, ``now`` as time.perf_counter has it; again where another one must
        be taken."""

    def head(self, status: int) -> None: ...

    def body(self, data: bytes, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. prefix: of all paths, without ``/v1``."""

    host: str
    port: int
    secure: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """``http[s]://HOST[:PORT][/PREFIX][/v1]``. Raises ValueError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url: {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url: {url!r}; allowed is http[s]://HOST[:PORT][/PREFIX]")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if secure else 80), secure, prefix)

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.netloc}{self.prefix}"


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Its owner closes it when a request was not read to its end."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = 0.0
        self._began = False
        self.usable = True

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send, and hand the answer on until it is whole. Raises ConnectionLost."""
        assert self._transport is not None
        assert self.usable
        assert self._done is None
        self._sink, self._began = sink, False
        self._done = asyncio.get_running_loop().create_future()
        sink.sent(time.perf_counter())
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._sink = self._done = None

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._began = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is no HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._fail(f"the server closed the connection{f': {exc}' if exc else ''}")

    # httptools

    def on_headers_complete(self) -> None:
        if self._sink is not None:
            self._sink.head(self._parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink.body(data, self._now)

    def on_message_complete(self) -> None:
        self.usable = self.usable and self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionLost(why, unused=not self._began))


class Pool:
    """Connections to one server: as many as there are requests at once, the last used first."""

    def __init__(self, address: Address, connect: Callable[[], Connection] = Connection) -> None:
        self._address = address
        self._connect = connect
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if address.secure else None

    async def warm(self, count: int) -> None:
        """Open connections ahead. What fails will fail the requests that need it."""
        opened = await asyncio.gather(*(self._open() for _ in range(count)), return_exceptions=True)
        self._idle += [one for one in opened if isinstance(one, Connection)]

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """On a kept connection where one is free. One that the server closed meanwhile is no failure of the request.

        Raises OSError: ConnectionLost, or why there is no connection. Cancelled, it closes the connection.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                try:
                    return await self._use(connection, request, sink)
                except ConnectionLost as lost:
                    if not lost.unused:
                        raise
        return await self._use(await self._open(), request, sink)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _use(self, connection: Connection, request: bytes, sink: Sink) -> None:
        try:
            await connection.exchange(request, sink)
        except BaseException:
            connection.close()
            raise
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await loop.create_connection(
                self._connect, self._address.host, self._address.port, ssl=self._tls
            )
        return connection
