"""An answer that may hold calls, read as it comes: what is text, and what is a call.

The result does not depend on how the text was cut into pieces. What looks like a call and is none, by its shape or
since no such tool is there, comes back as text. White space next to a call belongs to the format and is left out.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from onebase.serve.api.tools.call import CallReader, State
from onebase.serve.api.tools.syntax import Syntax

_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class CallPiece:
    """News of the call with this index. id and name come with its first piece, and with no other."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


class _At(Enum):
    START = auto()
    TEXT = auto()
    CALLS = auto()  # behind an opening
    CALL = auto()
    BEHIND = auto()  # a call
    GAP = auto()  # white space before text
    END = auto()


class ToolParser:
    """names: of the tools. most: how many calls are read; what follows them is dropped, see ``is_full``. opened: the
    prompt has the opening already.
    """

    def __init__(
        self, syntax: Syntax, names: Collection[str], *, most: int | None = None, opened: bool = False
    ) -> None:
        self._syntax = syntax
        self._names = frozenset(names)
        self._most = most
        self._at = _At.CALLS if opened else _At.START
        self._reader = CallReader(self._names)
        self._buffer = ""
        self._raw = ""  # of what may be a call: what was read before its reader
        self._told: list[str | CallPiece] = []
        self._started = False  # the call at hand
        self.num_calls = 0

    @property
    def is_full(self) -> bool:
        """No more calls are wanted."""
        return self._at is _At.END

    def push(self, text: str) -> list[str | CallPiece]:
        """Texts and pieces of calls, in order."""
        self._buffer += text
        while self._STEPS[self._at](self):
            pass
        return self._take()

    def finish(self) -> list[str | CallPiece]:
        """No text follows: what was held back is text, but for white space behind a call."""
        left = self._buffer
        if self._at is _At.CALL and not self._started:
            left = self._raw + self._reader.give_up()
        elif self._at is _At.CALLS:
            left = self._raw + left
        elif self._at in (_At.CALL, _At.END):
            left = ""
        elif self._at in (_At.BEHIND, _At.GAP):
            left = left.strip()
        self._tell(left)
        self._buffer = ""
        return self._take()

    def _start(self) -> bool:
        """A call may stand at the very start without an opening."""
        if not self._syntax.bare:
            self._at = _At.TEXT
            return True
        text = self._buffer.lstrip()
        if not text:
            return False
        if text[0] != "{":
            self._at = _At.TEXT
            return True
        self._raw, self._buffer = self._buffer[: -len(text)], text
        return self._open_call()

    def _text(self) -> bool:
        """Text up to an opening; what may become one is held back, with the white space before it."""
        opening = self._syntax.opening
        at = self._buffer.find(opening)
        found = at >= 0
        end = at if found else len(self._buffer) - _overlap(self._buffer, opening)
        end = len(self._buffer[:end].rstrip())
        self._tell(self._buffer[:end])
        if not found:
            self._buffer = self._buffer[end:]
            return False
        behind = at + len(opening)
        self._raw, self._buffer, self._at = self._buffer[end:behind], self._buffer[behind:], _At.CALLS
        return True

    def _calls(self) -> bool:
        """Behind an opening or a separator: the bracket of a list, then a call."""
        text = self._buffer.lstrip()
        if not text:
            return False
        skipped = len(self._buffer) - len(text) + (self._syntax.listed and text[0] == "[")
        self._raw += self._buffer[:skipped]
        self._buffer = self._buffer[skipped:]
        return self._open_call()

    def _open_call(self) -> bool:
        self._reader, self._started, self._at = CallReader(self._names), False, _At.CALL
        return True

    def _call(self) -> bool:
        text, self._buffer = self._buffer, ""
        arguments = self._reader.push(text) if text else ""
        state = self._reader.state
        if state is State.FAILED:
            self._tell(self._raw)
            self._buffer, self._raw, self._at = self._reader.rest, "", _At.TEXT
            return True
        if state is State.HEAD:
            return False
        self._tell_call(arguments)
        if state is not State.DONE:
            return False
        self._buffer, self._raw = self._reader.rest, ""
        self._at = _At.END if self.num_calls == self._most else _At.BEHIND
        return True

    def _behind(self) -> bool:
        """Behind a call: another one, the closing, or text again."""
        text = self._buffer.lstrip()
        for mark, after in ((self._syntax.separator, _At.CALLS), (self._syntax.closing, _At.GAP)):
            if mark and text.startswith(mark):
                self._raw, self._buffer, self._at = mark, text[len(mark) :], after
                return True
        marks = (self._syntax.separator, self._syntax.closing, self._syntax.opening)
        if any(mark.startswith(text) for mark in marks if mark):
            return False  # white space alone, or the start of a mark
        self._at = _At.GAP
        return True

    def _gap(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._at = _At.TEXT
        return True

    def _end(self) -> bool:
        self._buffer = ""
        return False

    def _tell(self, text: str) -> None:
        if text:
            self._told.append(text)

    def _tell_call(self, arguments: str) -> None:
        if self._started:
            if arguments:
                self._told.append(CallPiece(self.num_calls - 1, arguments))
            return
        self._started = True
        self.num_calls += 1
        made = _short_id() if self._syntax.short_ids else f"call_{secrets.token_hex(12)}"
        self._told.append(CallPiece(self.num_calls - 1, arguments, made, self._reader.name))

    def _take(self) -> list[str | CallPiece]:
        told, self._told = self._told, []
        return told

    _STEPS: ClassVar[Mapping[_At, Callable[[ToolParser], bool]]] = {
        _At.START: _start,
        _At.TEXT: _text,
        _At.CALLS: _calls,
        _At.CALL: _call,
        _At.BEHIND: _behind,
        _At.GAP: _gap,
        _At.END: _end,
    }


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that is a start of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _short_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))
