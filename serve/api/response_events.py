"""A choice's deltas as items and events of the Responses API. An answer that is not streamed is the last event's."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onebase.serve.api.deltas import Delta
from onebase.serve.api.errors import ApiError
from onebase.serve.api.generation import Usage
from onebase.serve.api.logprobs import chat_logprobs
from onebase.serve.api.token_texts import TokenTexts
from onebase.serve.api.tools.parser import CallPiece

Event = dict[str, Any]


@dataclass(slots=True)
class _Open:
    """The output item under way. pieces: of its text or arguments."""

    index: int
    item: dict[str, Any]
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_message(self) -> bool:
        return bool(self.item["type"] == "message")

    @property
    def place(self) -> dict[str, Any]:
        where = {"item_id": self.item["id"], "output_index": self.index}
        return {**where, "content_index": 0} if self.is_message else where


class ResponseWriter:
    """Of one response. ``shared``: its fields that stand from the start."""

    def __init__(self, shared: Mapping[str, Any], texts: TokenTexts) -> None:
        self._shared = shared
        self._texts = texts
        self._output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._number = 0

    def opening(self) -> list[Event]:
        response = self._response("in_progress")
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=response) for kind in kinds]

    def write(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        for piece in delta.calls:
            events += self._call(piece)
        if delta.text or delta.scores:
            events += self._text(delta)
        return events

    def closing(self, reason: str, usage: Usage) -> list[Event]:
        """The last events. The very last one has the whole response."""
        cut = reason == "length"
        events: list[Event] = []
        if self._open is None and not self._output:
            events += self._start_message()
        events += self._close("incomplete" if cut else "completed")
        response = self._response("incomplete" if cut else "completed") | {
            "usage": _usage(usage),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else time.time(),
        }
        return [*events, self._event("response.incomplete" if cut else "response.completed", response=response)]

    def failed(self, error: ApiError) -> Event:
        """In place of what was to come."""
        told = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self._response("failed") | {"error": told})

    def _text(self, delta: Delta) -> list[Event]:
        events = [] if self._open is not None and self._open.is_message else self._start_message()
        opened = self._opened()
        logprobs = chat_logprobs(delta.scores, self._texts)["content"] if delta.scores else []
        opened.pieces.append(delta.text)
        opened.logprobs += logprobs
        return [
            *events,
            self._event("response.output_text.delta", **opened.place, delta=delta.text, logprobs=logprobs),
        ]

    def _call(self, piece: CallPiece) -> list[Event]:
        events: list[Event] = []
        if piece.name:
            item = {"type": "function_call", "call_id": piece.id, "name": piece.name, "arguments": ""}
            events += self._start(item, "fc")
        opened = self._opened()
        if piece.arguments:
            opened.pieces.append(piece.arguments)
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **opened.place, delta=piece.arguments))
        return events

    def _start_message(self) -> list[Event]:
        events = self._start({"type": "message", "role": "assistant", "content": []}, "msg")
        part = _part("", [])
        return [*events, self._event("response.content_part.added", **self._opened().place, part=part)]

    def _start(self, item: dict[str, Any], prefix: str) -> list[Event]:
        events = self._close("completed")
        named = {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress", **item}
        self._open = _Open(len(self._output), named)
        return [*events, self._event("response.output_item.added", output_index=self._open.index, item=named)]

    def _opened(self) -> _Open:
        if self._open is None:
            raise RuntimeError("no output item is open")
        return self._open

    def _close(self, status: str) -> list[Event]:
        opened, self._open = self._open, None
        if opened is None:
            return []
        text = "".join(opened.pieces)
        item = {**opened.item, "status": status}
        if opened.is_message:
            part = _part(text, opened.logprobs)
            item["content"] = [part]
            done = [
                self._event("response.output_text.done", **opened.place, text=text, logprobs=opened.logprobs),
                self._event("response.content_part.done", **opened.place, part=part),
            ]
        else:
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            done = [self._event(kind, **opened.place, name=item["name"], arguments=text)]
        self._output.append(item)
        return [*done, self._event("response.output_item.done", output_index=opened.index, item=item)]

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._shared, "status": status, "output": list(self._output)}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
