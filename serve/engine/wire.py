"""The binary form of what API side and engine say: a msgpack pair (kind, payload) per message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
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

EXIT_REJECTED = 3  # exit status of an engine process whose base cannot be served


@dataclass(frozen=True, slots=True)
class Abort:
    """The client left: forget the request."""

    id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the loop."""


Message = (
    Request
    | Abort
    | LoadAdapter
    | UnloadAdapter
    | Shutdown
    | EngineInfo
    | EngineStats
    | TokenOutput
    | Failure
    | AdapterReady
    | AdapterGone
    | SetPins
    | HostChanges
)
_KINDS: tuple[type[Message], ...] = (
    Request,
    Abort,
    LoadAdapter,
    UnloadAdapter,
    Shutdown,
    EngineInfo,
    EngineStats,
    TokenOutput,
    Failure,
    AdapterReady,
    AdapterGone,
    SetPins,
    HostChanges,
)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_DECODERS = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
_ENCODER = msgspec.msgpack.Encoder()
_BATCH = msgspec.msgpack.Decoder(list[tuple[int, msgspec.Raw]])


def encode(messages: Iterable[Message]) -> bytes:
    """One frame for any number of messages."""
    return _ENCODER.encode([(_NUMBERS[type(message)], message) for message in messages])


def decode(frame: bytes) -> list[Message]:
    """The messages of a frame, in order. Raises msgspec.MsgspecError on anything else."""
    return [_DECODERS[number].decode(payload) for number, payload in _BATCH.decode(frame)]
