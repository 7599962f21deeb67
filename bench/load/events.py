"""A streamed answer, event by event: when pieces with text came, and what the server counted."""

from __future__ import annotations

from typing import Any

import msgspec

MOST_LINE = 1 << 22
_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class EventStream:
    """Fed with the body as it comes. Of several choices in one event it is one piece.

    pieces: when those with text came, on the caller's clock. events: all with data. error: the first that was one, or
    why the rest cannot be read: from then on nothing counts.
    """

    __slots__ = ("_rest", "done", "error", "events", "pieces", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.pieces: list[float] = []
        self.events = 0
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None
        self.error: str | None = None
        self.done = False
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """More of the body, which came ``now``."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and self.error is None and not self.done:
                self._event(line[5:].strip(), now)
        if len(self._rest) > MOST_LINE:
            self.error, self._rest = f"a line of more than {MOST_LINE} bytes", b""

    def _event(self, data: bytes, now: float) -> None:
        self.events += 1
        if data == _DONE:
            self.done = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as error:
            self.error = f"an event that is none: {error}"
            return
        if event.error is not None:
            self.error = str(event.error)[:500]
            return
        if any(choice.has_text() for choice in event.choices):
            self.pieces.append(now)
        if event.usage is not None:
            self.tokens_in, self.tokens_out = event.usage.prompt_tokens, event.usage.completion_tokens
