"""Every message survives the wire unchanged."""

from __future__ import annotations

import msgspec
import pytest

from onebase.serve.engine import messages as m
from onebase.serve.engine.wire import Abort, Message, Shutdown, decode, encode

MESSAGES: list[Message] = [
    m.Request("a", (1, 2), m.SamplingParams(seed=-5, stop_token_ids=(3,)), (m.AdapterUse("d", "/p", 0.5),)),
    Abort("a"),
    m.LoadAdapter("c", m.AdapterUse("d", "/p")),
    m.UnloadAdapter("c", "d", force=True),
    m.SetPins((m.AdapterUse("d", "/p"),)),
    m.HostChanges(("d",), ("e", "f")),
    Shutdown(),
    m.EngineInfo("Llama", "f", "cpu", "float32", 10, 20, 16, 3, 4, (2,)),
    m.EngineStats(
        running=1,
        resident={"d": 5},
        running_adapters=("d",),
        host=m.TierStats(3, 9, 1, hits=2),
        load_seconds={"read": m.Seconds((0, 2), 0.5)},
    ),
    m.TokenOutput("a", (7,), "stop"),
    m.TokenOutput("a", (), classes=m.ClassLogits(2, True, b"\x00\xff\x00\x00abcd")),
    m.Request("a", (1,), m.SamplingParams(0), (), classifies=True),
    m.Request("a", (1,), m.SamplingParams(0), (), embeds="mean"),
    m.TokenOutput("a", (), "length", embedding=b"\x00\x00\x80?"),
    m.TokenOutput("a", (7,), None, m.Logprobs(1, b"\x00\xff\x00\x00", b"abcd", b"efgh", b"ijkl", b"mnop")),
    m.Failure("a", "AdapterRejected", "no", "r"),
    m.AdapterReady("c", "d", "LORA", 8, 100, 2),
    m.AdapterGone("c", "d", True, 2),
]


def test_messages_survive() -> None:
    assert decode(encode(MESSAGES)) == MESSAGES


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x91\x92\x00\x01", encode(MESSAGES)[:-1]])
def test_garbage_is_an_error(frame: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(frame)
