"""One call, read as it comes: ``{"name": "f", "arguments": {...}}``, or Mistral's ``f[ARGS]{...}``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum, auto

from onebase.adapters.strict_json import JsonError, parse_strict
from onebase.serve.api.tools.syntax import ARGUMENTS, PARAMETERS

_OBJECT = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\][a-zA-Z0-9]+)?\[ARGS\]\s*(?=\{)")
_MAY_BE_NAMED = re.compile(r"[a-zA-Z0-9_\[\]-]{0,200}\s*")


class Balance:
    """Where a JSON object ends, in a text that comes in pieces. depth: of the objects that are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str, start: int = 0) -> int | None:
        """The index behind the bracket that closes the outermost object; None where it is not in this piece."""
        for index in range(start, len(text)):
            if self._closes(text[index]):
                return index + 1
        return None

    def _closes(self, char: str) -> bool:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return False
        self._in_string = char == '"'
        self._depth += (char in "{[") - (char in "}]")
        return char in "}]" and self._depth == 0


class State(Enum):
    HEAD = auto()  # nothing is certain yet
    ARGUMENTS = auto()
    TAIL = auto()  # behind the arguments, within the object
    DONE = auto()
    FAILED = auto()  # it is no call


class CallReader:
    """name: known once the state is past HEAD, and one of ``names``. Arguments come as the model wrote them, be they
    JSON or not; where they do not end, all that follows belongs to them.

    rest: what came behind the call; of one that FAILED all of its text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._whole = Balance()
        self._scanned = 0
        self._arguments = Balance()
        self._tail = Balance(depth=1)
        self._is_object = True
        self._buffer = ""
        self.state = State.HEAD
        self.name = ""
        self.rest = ""

    def push(self, text: str) -> str:
        """The piece of the arguments that became certain."""
        if self.state is State.HEAD:
            self._buffer += text
            return self._head()
        if self.state is State.ARGUMENTS:
            return self._take_arguments(text)
        self._take_tail(text)
        return ""

    def give_up(self) -> str:
        """No text follows: what was held back and is no call."""
        return self._buffer

    def _head(self) -> str:
        for pattern in (_OBJECT, _NAMED):
            if found := pattern.match(self._buffer):
                return self._start(found[1], pattern is _OBJECT, self._buffer[found.end() :])
        text = self._buffer.lstrip()
        if text.startswith("{"):
            return self._whole_object()
        if _MAY_BE_NAMED.fullmatch(text) is None:
            self._fail()
        return ""

    def _start(self, name: str, is_object: bool, text: str) -> str:
        if name not in self._names:
            return self._fail()
        self.name, self._is_object, self._buffer = name, is_object, ""
        self.state = State.ARGUMENTS
        return self._take_arguments(text)

    def _take_arguments(self, text: str) -> str:
        end = self._arguments.end(text)
        if end is None:
            return text
        self.state = State.TAIL
        self._take_tail(text[end:])
        return text[:end]

    def _take_tail(self, text: str) -> None:
        """Further fields of the object are left out: Mistral's models may write an id."""
        end = self._tail.end(text) if self._is_object else 0
        if end is not None:
            self.state, self.rest = State.DONE, text[end:]

    def _whole_object(self) -> str:
        """Fields in another order, or without arguments: read once it is complete."""
        end = self._whole.end(self._buffer, self._scanned)
        self._scanned = len(self._buffer)
        if end is None:
            return ""
        call = _parsed(self._buffer[:end], self._names)
        if call is None:
            return self._fail()
        self.state, self.rest, self._buffer = State.DONE, self._buffer[end:], ""
        self.name, arguments = call
        return arguments

    def _fail(self) -> str:
        self.state, self.rest, self._buffer = State.FAILED, self._buffer, ""
        return ""


def _parsed(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Name and arguments of a whole object, if it is a call."""
    try:
        value = parse_strict(text)
    except JsonError:
        return None
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get(ARGUMENTS, value.get(PARAMETERS))
    if isinstance(arguments, str):  # JSON within JSON
        return name, arguments
    if not isinstance(arguments, dict | None):
        return None
    return name, json.dumps(arguments or {}, ensure_ascii=False)
