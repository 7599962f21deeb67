"""The engine process: `python -m onebase.serve.engine.process ADDRESS`, its options as JSON on standard input.

Standard input stays open as long as the parent lives: when it closes, this process ends too.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence as Many

import msgspec
import zmq

from onebase.adapters.errors import ModelRejected
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.loop import Output, Stop, run
from onebase.serve.engine.messages import Command, EngineStats, Failure, LoadAdapter, Request, SetPins, UnloadAdapter
from onebase.serve.engine.threads import use_all_cores
from onebase.serve.engine.wire import EXIT_REJECTED, Abort, Message, Shutdown, decode, encode


class SocketLink:
    """Link over a ZeroMQ PAIR socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def receive(self, timeout: float | None) -> list[Command]:
        messages: list[Command] = []
        wait = None if timeout is None else int(timeout * 1000)
        while self._socket.poll(wait):
            messages.extend(_accepted(message) for message in decode(self._socket.recv()))
            wait = 0
        return messages

    def send(self, outputs: Many[Output], stats: EngineStats | None) -> None:
        self._socket.send(encode([*outputs, stats] if stats is not None else outputs))


def _accepted(message: Message) -> Command:
    match message:
        case Shutdown():
            raise Stop
        case Abort():
            return message.id
        case Request() | LoadAdapter() | UnloadAdapter() | SetPins():
            return message
        case _:
            raise TypeError(f"not a message for the engine: {type(message).__name__}")


def main(address: str) -> int:
    """Load the model, say so, run the loop. Exit status 3: the base cannot be served, and why was sent."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.json.decode(_read_line(), type=EngineConfig)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(address)
    use_all_cores()
    try:
        engine = Engine(config)
    except ModelRejected as error:
        socket.send(encode([Failure("", type(error).__name__, error.message, error.param)]))
        socket.close(linger=5000)
        return EXIT_REJECTED
    engine.grammars.warm_up()
    _settle_memory()
    socket.send(encode([engine.info]))
    run(engine, SocketLink(socket))
    return 0


def _settle_memory() -> None:
    """What is there now stays: the collector need not look at it again. It took 60 to 115 ms of the loop each time."""
    gc.collect()
    gc.freeze()


def _read_line() -> bytes:
    """The first line of standard input, unbuffered: the rest is for the thread that waits for its end."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
