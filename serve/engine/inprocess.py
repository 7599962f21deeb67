"""An engine in a thread of the API process: for tests, debugging and benchmarks."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many

from onebase.adapters.errors import EngineDead
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.dispatch import DispatchingClient
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.loop import Output, Stop, run
from onebase.serve.engine.messages import Command, EngineStats

_Post = Callable[[Many[Output], EngineStats | None], None]


class InProcessEngine(DispatchingClient):
    """EngineClient over a thread. ``engine`` is there for tests, to look inside once the client has stopped."""

    def __init__(self, config: EngineConfig, engine: Engine | None = None) -> None:
        super().__init__()
        self.engine = engine
        self._config = config
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """See EngineClient.start."""
        self._loop = asyncio.get_running_loop()
        if self.engine is None:
            self.engine = await asyncio.to_thread(Engine, self._config)
        self._info = self.engine.info
        self._thread = threading.Thread(target=self._run, args=(self.engine,), name="engine", daemon=True)
        self._thread.start()
        self._ready = True

    async def stop(self) -> None:
        """See EngineClient.stop."""
        self._ready = False
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)
        self._fail_all(EngineDead("the engine was stopped"))

    def _send(self, message: Command) -> None:
        self._inbox.put(message)

    def _run(self, engine: Engine) -> None:
        try:
            run(engine, _ThreadLink(self._inbox, self._post))
        except Exception as error:
            self._call(self._died, error)
            raise

    def _post(self, outputs: Many[Output], stats: EngineStats | None) -> None:
        self._call(self._receive, list(outputs), stats)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _receive(self, outputs: Many[Output], stats: EngineStats | None) -> None:
        self._stats = stats or self._stats
        for output in outputs:
            self._deliver(output)

    def _died(self, error: Exception) -> None:
        self._ready = False
        self._fail_all(EngineDead(f"the engine stopped: {type(error).__name__}: {error}"))


class _ThreadLink:
    """Link over queues."""

    def __init__(self, inbox: queue.SimpleQueue[Command | None], post: _Post) -> None:
        self._inbox = inbox
        self._post = post

    def receive(self, timeout: float | None) -> list[Command]:
        messages: list[Command] = []
        try:
            messages.append(_checked(self._inbox.get(timeout is None or timeout > 0, timeout or None)))
            while True:
                messages.append(_checked(self._inbox.get_nowait()))
        except queue.Empty:
            return messages

    def send(self, outputs: Many[Output], stats: EngineStats | None) -> None:
        self._post(outputs, stats)


def _checked(message: Command | None) -> Command:
    if message is None:
        raise Stop
    return message
