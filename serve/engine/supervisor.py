"""The engine in a process of its own, watched: when it dies, streams end with an error and it is started again.

The API process never waits for the engine: /health and /metrics answer whatever the engine does.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import structlog
import zmq
import zmq.asyncio

from onebase.adapters.errors import EngineDead, ModelRejected
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.dispatch import DispatchingClient, error_of
from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    Command,
    EngineInfo,
    EngineStats,
    Failure,
    HostChanges,
    Request,
    TokenOutput,
)
from onebase.serve.engine.quarantine import Quarantine
from onebase.serve.engine.wire import EXIT_REJECTED, Abort, Message, Shutdown, decode, encode

_FIRST_BACKOFF, _MOST_BACKOFF = 0.2, 30.0  # seconds between a death and the next start; doubles while none gets ready
_LAST_WORDS = 100  # milliseconds without a message after which a dead process has said all
_GRACE = 5.0  # seconds for a clean end before the process is killed
_log = structlog.get_logger("engine")


class SupervisedEngine(DispatchingClient):
    """EngineClient over a child process and a ZeroMQ PAIR socket."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__()
        self._config = config
        self._context = zmq.asyncio.Context()
        self._folder = Path(tempfile.mkdtemp(prefix="onebase-"))
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._quarantine = Quarantine()
        self._in_flight: dict[str, Request] = {}
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """See EngineClient.start. Raises EngineDead where the first process ends without a reason."""
        self._started = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")
        await asyncio.shield(self._started)

    async def stop(self) -> None:
        """See EngineClient.stop."""
        self._stopping = True
        self._ready = False
        if self._process is not None and self._process.returncode is None:
            await self._end(self._process)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(EngineDead("the server is stopping"))
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """See EngineClient.generate. A request that was present at several crashes is refused."""
        self._quarantine.check(request)
        self._in_flight[request.id] = request
        tokens = super().generate(request)
        try:
            async for output in tokens:
                yield output
            self._quarantine.finished(request)
        finally:
            self._in_flight.pop(request.id, None)
            await tokens.aclose()

    def _send(self, message: Command) -> None:
        if self._socket is None:
            raise EngineDead("the engine is not running; it is being started")
        self._socket.send(encode([Abort(message) if isinstance(message, str) else message]))

    async def _supervise(self) -> None:
        backoff = _FIRST_BACKOFF
        while True:
            was_ready = await self._one_life()
            if self._stopping:
                return
            backoff = _FIRST_BACKOFF if was_ready else min(backoff * 2, _MOST_BACKOFF)
            self._restarts += 1
            await asyncio.sleep(backoff)

    async def _one_life(self) -> bool:
        """Start a process and serve until it ends. Returns whether it ever was ready."""
        address = f"ipc://{self._folder}/{self._restarts}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._process = process = await self._spawn(address)
        reader = asyncio.create_task(self._read(self._socket), name="engine-reader")
        code = await process.wait()
        reader.cancel()
        while await self._socket.poll(_LAST_WORDS):  # what was sent before the end is delivered first
            self._read_frame(await self._socket.recv())
        was_ready, self._ready = self._ready, False
        self._socket.close(linger=0)
        self._socket = None
        self._mourn(code)
        return was_ready

    async def _spawn(self, address: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "onebase.serve.engine.process",
            address,
            stdin=asyncio.subprocess.PIPE,
            env=_env(),
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        with suppress(ConnectionError):  # it died at once; its exit status tells
            await process.stdin.drain()
        return process

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._read_frame(await socket.recv())

    def _read_frame(self, frame: bytes) -> None:
        for message in decode(frame):
            self._receive(message)

    def _receive(self, message: Message) -> None:
        match message:
            case EngineStats():
                self._stats = message
            case EngineInfo():
                self._info = message
                self._now_ready()
                _tell(message)
                self._resolve_start(None)
            case Failure(id=""):
                self._resolve_start(error_of(message))
            case TokenOutput() | Failure() | AdapterReady() | AdapterGone() | HostChanges():
                self._deliver(message)

    def _mourn(self, code: int) -> None:
        """The process ended: fail everybody who waits, remember who was there."""
        if self._stopping:
            return
        _log.error("engine died", exit_status=code, requests_in_flight=len(self._in_flight))
        self._forget()
        self._quarantine.crashed(self._in_flight.values())
        self._fail_all(EngineDead(f"the engine process ended (exit status {code}) while it served this request"))
        if self._started is not None and not self._started.done():
            self._stopping = True
            kind = ModelRejected if code == EXIT_REJECTED else EngineDead
            self._resolve_start(kind(f"the engine process ended with exit status {code} before it was ready"))

    def _resolve_start(self, error: Exception | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._stopping = isinstance(error, ModelRejected) or self._stopping
            self._started.set_exception(error)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if self._socket is not None:
            self._socket.send(encode([Shutdown()]))
        try:
            await asyncio.wait_for(process.wait(), _GRACE)
        except TimeoutError:
            process.kill()
            await process.wait()


def _tell(info: EngineInfo) -> None:
    """A line of what is served, and the memory's budget as a table."""
    _log.info("engine ready", **asdict(replace(info, memory=())))
    for row in info.memory:
        _log.info(str(row), what=row.what, nbytes=row.nbytes)


def _env() -> dict[str, str]:
    """The child's environment: ours, with one tokenizer thread pool less."""
    return os.environ | {"TOKENIZERS_PARALLELISM": "false"}
