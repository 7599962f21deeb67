"""Recorded traffic from files. The shape is told by the columns of a CSV file, or the keys of a JSONL file:

    own        time,adapter,tokens_in,tokens_out          seconds; adapter may be missing or empty
    Azure      TIMESTAMP,ContextTokens,GeneratedTokens    LLM inference traces of 2023 and 2024; dates
    BurstGPT   Timestamp,Request tokens,Response tokens   seconds; requests without a response are left out
    Mooncake   timestamp,input_length,output_length,hash_ids   milliseconds; 512 tokens a hash

Times are shifted so that the first request comes at 0.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

MOST_REQUESTS = 5_000_000
MOST_TOKENS = 1 << 24
MOST_LINE = 1 << 20  # characters
MOONCAKE_BLOCK = 512

Row = Mapping[str, Any]


class TraceError(ValueError):
    """A trace that cannot be read. The message names file, line and field."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """at: seconds since the first. adapter: a name of the file's own, none where it names none. blocks: what pieces of
    ``MOONCAKE_BLOCK`` tokens the prompt begins with; equal numbers, equal tokens."""

    at: float
    adapter: str | None
    tokens_in: int
    tokens_out: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Shape:
    needed: frozenset[str]
    read: Callable[[Row], TraceRequest | None]


def read_trace(path: Path, most: int = MOST_REQUESTS) -> list[TraceRequest]:
    """In order of time, at most ``most`` from the file's start. Raises TraceError, and OSError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = _jsonl(file) if path.suffix in (".jsonl", ".json") else _csv(file)
            found = list(itertools.islice(_requests(rows), most))
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text") from None
    except (ValueError, csv.Error) as error:
        raise TraceError(f"{path}, {error}") from None
    if not found:
        raise TraceError(f"{path}: no request in it")
    found.sort(key=lambda request: request.at)
    return [replace(request, at=request.at - found[0].at) for request in found]


def _requests(rows: Iterator[tuple[int, Row]]) -> Iterator[TraceRequest]:
    shape: _Shape | None = None
    for line, row in rows:
        try:
            shape = shape or _shape_of(row)
            request = shape.read(row)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None
        if request is not None:
            yield request


def _csv(file: TextIO) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(_lines(file))
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num}: {'more' if None in row else 'fewer'} values than columns")
        yield reader.line_num, row


def _jsonl(file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"line {number}: no JSON") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: no JSON object")
            yield number, row


def _lines(file: TextIO) -> Iterator[str]:
    for number in itertools.count(1):
        if not (line := file.readline(MOST_LINE + 1)):
            return
        if len(line) > MOST_LINE:
            raise ValueError(f"line {number}: more than {MOST_LINE} characters")
        yield line


def _own(row: Row) -> TraceRequest:
    name = row.get("adapter")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"adapter: {name!r}; allowed is a name")
    return TraceRequest(_time(row, "time"), name or None, *_tokens(row, "tokens_in", "tokens_out"))


def _azure(row: Row) -> TraceRequest:
    text = str(row["TIMESTAMP"]).strip()
    try:
        # Seven digits of a second, more than a datetime has.
        whole, _, rest = text.partition(".")
        fraction = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        date = datetime.fromisoformat(whole + rest.removeprefix(fraction))
    except ValueError:
        raise ValueError(f"TIMESTAMP: {text[:100]!r}; allowed is a date and a time") from None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return TraceRequest(
        date.timestamp() + float(f"0.{fraction or 0}"), None, *_tokens(row, "ContextTokens", "GeneratedTokens")
    )


def _burstgpt(row: Row) -> TraceRequest | None:
    if _count(row, "Response tokens", least=0) == 0:
        return None
    return TraceRequest(_time(row, "Timestamp"), None, *_tokens(row, "Request tokens", "Response tokens"))


def _mooncake(row: Row) -> TraceRequest:
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 1 << 62 for one in ids):
        raise ValueError("hash_ids: allowed is a list of whole numbers from 0")
    tokens = _tokens(row, "input_length", "output_length")
    return TraceRequest(_time(row, "timestamp") / 1000, None, *tokens, blocks=tuple(ids))


_SHAPES = (
    _Shape(frozenset({"time", "tokens_in", "tokens_out"}), _own),
    _Shape(frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    _Shape(frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt),
    _Shape(frozenset({"timestamp", "input_length", "output_length"}), _mooncake),
)


def _shape_of(row: Row) -> _Shape:
    for shape in _SHAPES:
        if shape.needed <= row.keys():
            return shape
    allowed = "; or ".join(", ".join(sorted(shape.needed)) for shape in _SHAPES)
    raise ValueError(f"columns {', '.join(map(str, row))[:200]!r}; needed are {allowed}")


def _tokens(row: Row, name_in: str, name_out: str) -> tuple[int, int]:
    return _count(row, name_in, least=1), _count(row, name_out, least=1)


def _count(row: Row, name: str, least: int) -> int:
    value = _number(row, name)
    if value != int(value) or not least <= value <= MOST_TOKENS:
        raise ValueError(f"{name}: {row[name]!r}; allowed is a whole number from {least} to {MOST_TOKENS}")
    return int(value)


def _time(row: Row, name: str) -> float:
    value = _number(row, name)
    if value < 0:
        raise ValueError(f"{name}: {row[name]!r}; allowed is a time from 0")
    return value


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: {str(value)[:100]!r}; allowed is a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: {str(value)[:100]!r}; allowed is a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: {value!r}; allowed is a finite number")
    return number
