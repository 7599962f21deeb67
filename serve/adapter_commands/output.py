"""What the commands print: a table for people, JSON for programs, messages on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]
WIDE = 10_000  # columns where nobody looks at a screen: nothing is cut

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nbytes: float | None) -> str:
    """Bytes in the largest unit that leaves a number of at least one."""
    if nbytes is None:
        return ""
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"


def when(seconds: float | None) -> str:
    """Local time to the minute."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def pairs(values: Mapping[str, Any] | None) -> str:
    return " ".join(f"{key}={value}" for key, value in (values or {}).items())


def plain(value: Any) -> Text:
    """What a server said, with no power over the terminal: no markup, no control characters."""
    text = "" if value is None else str(value)
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


_Column = tuple[str, Callable[[Json], Any]]

CARD_COLUMNS: Sequence[_Column] = (
    ("NAME", lambda card: card["name"]),
    ("VERSION", lambda card: card["version"]),
    ("STATE", lambda card: card["state"]),
    ("FAMILY", lambda card: card["family"]),
    ("RANK", lambda card: card["rank"]),
    ("SIZE", lambda card: size(card["bytes"])),
    ("TIER", lambda card: card["tier"]),
    ("PINNED", lambda card: "yes" if card["pinned"] else ""),
    ("USES", lambda card: card["uses"]),
    ("LABELS", lambda card: pairs(card["labels"])),
)
VERSION_COLUMNS: Sequence[_Column] = (
    ("VERSION", lambda card: card["version"]),
    ("CURRENT", lambda card: "yes" if card["current"] else ""),
    ("DIGEST", lambda card: card["digest"][:12]),
    ("FAMILY", lambda card: card["family"]),
    ("SIZE", lambda card: size(card["bytes"])),
    ("CREATED", lambda card: when(card["created"])),
    ("BY", lambda card: card["by"]),
    ("SOURCE", lambda card: card["source"]),
)


def show_rows(cards: Iterable[Json], columns: Sequence[_Column], *, as_json: bool) -> None:
    """The cards as a table, or as one JSON array."""
    if as_json:
        _print_json(list(cards))
        return
    table = Table(box=None, pad_edge=False)
    for title, _ in columns:
        table.add_column(title, no_wrap=True)
    for card in cards:
        table.add_row(*(plain(value(card)) for _, value in columns))
    _console().print(table)


def show_one(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """An answer field by field, or as one JSON object."""
    if as_json:
        _print_json(answer)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in answer.items():
        table.add_row(f"{key}:", plain(_shown(key, value)))
    _console().print(table)


def complain(message: str) -> None:
    print(f"onebase: {plain(message)}", file=sys.stderr)  # noqa: T201 - this is what a command line does


def _shown(key: str, value: Any) -> Any:
    if key == "created":
        return when(value)
    if key == "bytes":
        return size(value)
    if isinstance(value, dict):
        return pairs(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def _print_json(value: Any) -> None:
    print(json.dumps(value))  # noqa: T201
