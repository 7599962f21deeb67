"""What a grammar may be before anybody compiles it: bounds that need no compiler, and hold off what could kill one.

The compiler bounds its own work, but it recurses: along nested rules, and along chains of references. So what is deep
is refused here, and what is left fits the stacks of the threads that compile (deep_threads.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.messages import Grammar

MAX_SOURCE = 256 << 10  # characters
MAX_DEPTH = 100  # levels of a JSON schema: of the JSON, so a schema in a schema's properties is two
MAX_SCHEMA_OBJECTS = 10_000
MAX_LINES = 4000  # of a grammar: a rule can refer to the next one


def check_bounds(grammar: Grammar) -> None:
    """Raises RequestRejected, which says what is allowed."""
    if len(grammar.source) > MAX_SOURCE:
        raise RequestRejected(f"{len(grammar.source)} characters; at most {MAX_SOURCE} are compiled")
    try:
        grammar.source.encode()
    except UnicodeEncodeError:
        raise RequestRejected("it holds half of a surrogate pair, which is no character") from None
    if grammar.kind == "json_schema":
        _check_schema(grammar.source)
    if grammar.kind == "lark" and grammar.source.count("\n") >= MAX_LINES:
        raise RequestRejected(f"{grammar.source.count(chr(10)) + 1} lines; at most {MAX_LINES} are compiled")


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise RequestRejected(f"not valid JSON: {str(error)[:200]}") from None
    if not isinstance(schema, dict):
        raise RequestRejected("a JSON schema must be an object")
    objects = sum(isinstance(node, dict) for node in _nodes(schema))
    if objects > MAX_SCHEMA_OBJECTS:
        raise RequestRejected(f"{objects} objects in the schema; at most {MAX_SCHEMA_OBJECTS} are compiled")


def _nodes(schema: Any) -> Iterator[Any]:
    """Every value in it, level by level."""
    level, depth = [schema], 0
    while level:
        yield from level
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [child for node in level for child in _children(node)]


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _too_deep() -> RequestRejected:
    return RequestRejected(f"the schema nests deeper than {MAX_DEPTH} levels")
