"""The API side's half of every engine client: requests out, outputs to whoever waits for them."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence

from onebase.adapters import errors
from onebase.adapters.errors import EngineDead, EngineError, OneBaseError
from onebase.serve.engine.client import Tier
from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    AdapterUse,
    Command,
    EngineInfo,
    EngineStats,
    Failure,
    HostChanges,
    LoadAdapter,
    Request,
    SetPins,
    TokenOutput,
    UnloadAdapter,
)

Reply = TokenOutput | Failure | AdapterReady | AdapterGone
Output = Reply | HostChanges
_Queue = asyncio.Queue[Reply | OneBaseError]


class DispatchingClient(ABC):
    """Implements EngineClient's calls over ``_send`` and ``_deliver``. Used from one asyncio loop."""

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._ready = False
        self._restarts = 0
        self._in_host: set[str] = set()
        self._waiting: dict[str, _Queue] = {}
        self._command_ids = (f"command-{i}" for i in itertools.count())

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def restarts(self) -> int:
        return self._restarts

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """See EngineClient.generate."""
        queue = self._open(request.id)
        finished = False
        try:
            self._send(request)
            while not finished:
                output = _unwrap(await queue.get())
                if not isinstance(output, TokenOutput):
                    raise EngineError(f"the engine answered a request with {type(output).__name__}")
                finished = output.finish_reason is not None
                yield output
        except OneBaseError:
            finished = True
            raise
        finally:
            self._waiting.pop(request.id, None)
            if not finished and self._ready:
                self._send(request.id)

    async def load_adapter(self, use: AdapterUse) -> AdapterReady:
        """See EngineClient.load_adapter."""
        command = LoadAdapter(next(self._command_ids), use)
        reply = await self._command(command)
        if not isinstance(reply, AdapterReady):
            raise EngineError(f"the engine answered a load with {type(reply).__name__}")
        return reply

    async def unload_adapter(self, digest: str, *, force: bool = False) -> AdapterGone:
        """See EngineClient.unload_adapter."""
        reply = await self._command(UnloadAdapter(next(self._command_ids), digest, force))
        if not isinstance(reply, AdapterGone):
            raise EngineError(f"the engine answered an unload with {type(reply).__name__}")
        return reply

    def set_pins(self, uses: Sequence[AdapterUse]) -> None:
        """See EngineClient.set_pins."""
        if self._ready:
            self._send(SetPins(tuple(uses)))

    def tier(self, digest: str) -> Tier:
        """See EngineClient.tier."""
        if digest in self._stats.resident:
            return "device"
        return "host" if digest in self._in_host else "disk"

    async def _command(self, command: LoadAdapter | UnloadAdapter) -> Reply:
        queue = self._open(command.id)
        try:
            self._send(command)
            return _unwrap(await queue.get())
        finally:
            self._waiting.pop(command.id, None)

    def _open(self, key: str) -> _Queue:
        if not self._ready:
            raise EngineDead("the engine is not running; it is being started")
        if key in self._waiting:
            raise EngineError(f"id {key!r} is in use")
        queue = self._waiting[key] = asyncio.Queue()
        return queue

    def _deliver(self, output: Output) -> None:
        """Hand an output to its waiter; outputs of requests that were aborted have none."""
        if isinstance(output, HostChanges):
            self._in_host.update(output.added)
            self._in_host.difference_update(output.removed)
            return
        queue = self._waiting.get(output.id)
        if queue is not None:
            queue.put_nowait(output)

    def _forget(self) -> None:
        """The engine is gone, and with it what it held."""
        self._stats = EngineStats()
        self._in_host.clear()

    def _fail_all(self, error: OneBaseError) -> None:
        for queue in self._waiting.values():
            queue.put_nowait(error)

    @abstractmethod
    def _send(self, message: Command) -> None:
        """Pass a message (a str: abort this request) to the engine without waiting."""


def error_of(failure: Failure) -> OneBaseError:
    """The exception that a Failure stands for."""
    kind = getattr(errors, failure.kind, EngineError)
    known = isinstance(kind, type) and issubclass(kind, OneBaseError)
    return (kind if known else EngineError)(failure.message, param=failure.param)


def _unwrap(reply: Reply | OneBaseError) -> Reply:
    if isinstance(reply, OneBaseError):
        raise reply
    if isinstance(reply, Failure):
        raise error_of(reply)
    return reply
