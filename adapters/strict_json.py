"""JSON from strangers: no duplicate keys, no NaN or Infinity, bounded depth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

MAX_DEPTH = 16


class JsonError(ValueError):
    """Not JSON, or JSON that two parsers could read differently. The message says what is wrong."""


def parse_strict(text: str) -> JsonValue:
    """Parse one JSON document. Raises JsonError and nothing else."""
    value = parse_any_depth(text)
    _check_depth(value, MAX_DEPTH)
    return value


def parse_any_depth(text: str) -> JsonValue:
    """As parse_strict, for a caller who looks at every level of the value. Raises JsonError and nothing else."""
    try:
        value: JsonValue = _DECODER.decode(text)
    except RecursionError:
        raise JsonError(f"it nests deeper than {MAX_DEPTH} levels") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"it is not valid JSON ({str(error)[:120]})") from None
    return value


def _check_depth(value: JsonValue, levels: int) -> None:
    if not isinstance(value, list | dict):
        return
    if levels == 0:
        raise JsonError(f"it nests deeper than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, levels - 1)


def _unique(pairs: Sequence[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    result: dict[str, JsonValue] = {}
    for key, value in pairs:
        if key in result:
            raise JsonError(f"the key {key[:100]!r} appears twice")
        result[key] = value
    return result


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not allowed")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {digits[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
