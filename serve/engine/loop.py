"""Drives an engine from a link: receive -> step -> send, until told to stop. The same loop in a thread or a process."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import Protocol

from onebase.serve.engine.engine import Engine
from onebase.serve.engine.engine import Output as StepOutput
from onebase.serve.engine.messages import (
    Command,
    EngineStats,
    HostChanges,
    LoadAdapter,
    Request,
    SetPins,
    UnloadAdapter,
)

Output = StepOutput | HostChanges
_STATS_EVERY = 0.05  # seconds between two EngineStats while the loop is busy
_LOADING_WAIT = 0.002  # seconds to wait for messages while an adapter or a grammar is on its way and nothing runs


class Stop(Exception):
    """Raised by a link when the loop has to end."""


class Link(Protocol):
    """The engine's end of the connection to the API side."""

    def receive(self, timeout: float | None) -> Many[Command]:
        """What has come in; waits up to ``timeout`` seconds (None: for ever) for a first message.

        A str is the id of a request to abort. Raises Stop when the loop has to end.
        """

    def send(self, outputs: Many[Output], stats: EngineStats | None) -> None:
        """Deliver a step's outputs."""


def run(engine: Engine, link: Link) -> None:
    """The engine's loop. Ends without an error when the link says Stop."""
    last_stats = 0.0
    try:
        while True:
            outputs: list[Output] = []
            for message in link.receive(_patience(engine)):
                outputs.extend(apply(engine, message))
            outputs.extend(engine.step())
            now = time.monotonic()
            due = not (engine.has_work or engine.adapters.busy) or now - last_stats >= _STATS_EVERY
            last_stats = now if due else last_stats
            if due and (changes := engine.host_changes()) is not None:
                outputs.append(changes)
            if outputs or due:
                link.send(outputs, engine.stats() if due else None)
    except Stop:
        engine.close()


def apply(engine: Engine, message: Command) -> Many[Output]:
    """Hand one message to the engine."""
    match message:
        case Request():
            return engine.add(message)
        case LoadAdapter():
            return engine.load(message)
        case UnloadAdapter():
            return engine.unload(message)
        case SetPins():
            engine.set_pins(message)
            return []
        case str():
            engine.abort(message)
            return []


def _patience(engine: Engine) -> float | None:
    if engine.scheduler.running or engine.runner.has_spare_work:
        return 0.0
    loading = engine.adapters.busy or engine.grammars.busy
    if engine.has_work or loading:
        return _LOADING_WAIT if loading else 0.0
    return None
