"""The calls in a choice's deltas."""

from __future__ import annotations

from dataclasses import replace

from onebase.serve.api.deltas import Delta
from onebase.serve.api.tools.parser import CallPiece, ToolParser


class ToolReader:
    """Of one choice: text that the model wrote becomes text and pieces of calls. No delta has both."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser

    def read(self, delta: Delta) -> list[Delta]:
        """The delta in parts. The last of them has the reason, if the choice ends; it does behind the last call that
        is wanted."""
        parts = self._parser.push(delta.text)
        reason = delta.finish_reason
        if reason is not None:
            parts += self._parser.finish()
        elif self._parser.is_full:
            reason = "stop"
        if reason == "stop" and self._parser.num_calls:
            reason = "tool_calls"
        told = [_as_delta(delta.index, part) for part in parts] or [Delta(delta.index, "", 0)]
        told[0] = replace(told[0], tokens=delta.tokens, scores=delta.scores, prompt=delta.prompt)
        told[-1] = replace(told[-1], finish_reason=reason)
        return told


def _as_delta(index: int, part: str | CallPiece) -> Delta:
    return Delta(index, part, 0) if isinstance(part, str) else Delta(index, "", 0, calls=(part,))
