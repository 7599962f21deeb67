"""Grammars of calls, in llguidance's dialect of Lark: where one is forced, or where arguments have to fit a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onebase.serve.api.tool_schemas import Function
from onebase.serve.api.tools.syntax import Syntax
from onebase.serve.engine.grammar import WHITESPACE
from onebase.serve.engine.messages import Grammar

COMMA = '"," " "?'
SEMICOLON = '";" " "?'


def arguments_grammar(function: Function) -> Grammar:
    """Of one function's arguments alone: tells which of several schemas is at fault."""
    return Grammar("lark", f"start: %json {json.dumps(_schema(function), ensure_ascii=False)}")


class CallGrammars:
    """Of some functions in one format. tokens: the markers that are tokens of the vocabulary, with their ids: a grammar
    has to name them as such. many: more than one call is wanted."""

    def __init__(self, syntax: Syntax, functions: Sequence[Function], tokens: Mapping[str, int], *, many: bool) -> None:
        self._syntax = syntax
        self._functions = functions
        self._many = many
        self._opening, self._closing = (
            f"<[{tokens[mark]}]>" if mark in tokens else _quoted(mark) for mark in (syntax.opening, syntax.closing)
        )

    def forced(self) -> Grammar:
        """What follows ``syntax.tail``: calls alone."""
        if self._syntax.listed:
            return self._grammar(f'"[" {self._calls(COMMA)} "]"')
        again = SEMICOLON if self._syntax.bare else f'"\\n" {self._closing} "\\n" {self._opening} "\\n"'
        return self._grammar(self._calls(again))

    def free(self) -> Grammar:
        """Text that may hold calls."""
        syntax = self._syntax
        if syntax.bare:  # text is what does not start like a call
            return self._grammar(
                f"TEXT | block | {self._calls(SEMICOLON)}", f"block: {self._block()}", r"TEXT: /[^{](?s:.*)/"
            )
        times = "*" if self._many and not syntax.listed else "?"
        text = rf"TEXT: /(?s:.+)/ & ~/(?s:.*){_escaped(syntax.opening)}(?s:.*)/"
        return self._grammar(f"TEXT? (block TEXT?){times}", f"block: {self._block()}", text)

    def or_json(self, schema: str) -> Grammar:
        """Calls alone, or JSON that a schema describes. schema: an object, as JSON. Calls have their opening here: the
        lexer could not tell a bare one from the answer."""
        strict = {**json.loads(schema), "x-guidance": {"lenient": False, "whitespace_pattern": WHITESPACE}}
        blocks = 'block ("\\n" block)*' if self._many and not self._syntax.listed and not self._syntax.bare else "block"
        return self._grammar(f"answer | {blocks}", f"block: {self._block()}", f"answer: %json {json.dumps(strict)}")

    def _block(self) -> str:
        """Calls behind one opening."""
        if self._syntax.bare:
            return f"{self._opening} {self._calls(SEMICOLON)}"
        if self._syntax.listed:
            return f'{self._opening} " "? "[" {self._calls(COMMA)} "]"'
        return f'{self._opening} "\\n" call "\\n" {self._closing}'

    def _calls(self, between: str) -> str:
        return f"call ({between} call)*" if self._many else "call"

    def _grammar(self, start: str, *rules: str) -> Grammar:
        names = " | ".join(f"call_{index}" for index in range(len(self._functions)))
        calls = [line for at, function in enumerate(self._functions) for line in _call(at, function, self._syntax.key)]
        return Grammar("lark", "\n".join([f"start: {start}", *rules, f"call: {names}", *calls]))


def _call(index: int, function: Function, key: str) -> list[str]:
    head = f'{{"name": {json.dumps(function.name)}, "{key}": '
    schema = json.dumps(_schema(function), ensure_ascii=False)
    return [f'call_{index}: {_quoted(head)} arguments_{index} "}}"', f"arguments_{index}: %json {schema}"]


def _schema(function: Function) -> dict[str, Any]:
    """Keywords that cannot be enforced are refused where the function is strict, and overlooked where it is not."""
    options = {"lenient": function.strict is not True, "whitespace_pattern": WHITESPACE}
    return {**function.json_schema, "type": "object", "x-guidance": options}


def _quoted(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    """In a regular expression between slashes."""
    return "".join(f"\\{char}" if char in r"\/.[]{}()*+?|^$&~-" else char for char in text)
