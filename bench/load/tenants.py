"""Who sends: tenants with keys and their shares of the requests. A TOML file, one table each:

[[tenant]]
name = "research"
key = "..."
share = 2.0        # beside the others' shares; 1 unless said
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sender:
    """key: "" for none."""

    name: str = ""
    key: str = ""
    share: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.key, str):
            raise ValueError("name and key: texts")
        if any(not "!" <= character <= "~" for character in self.key):
            raise ValueError("key: printable ASCII characters without spaces")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < math.inf:
            raise ValueError("share: a number above 0")


def read_senders(path: Path) -> tuple[Sender, ...]:
    """Raises ValueError that names file and field, and OSError."""
    try:
        tables = tomllib.loads(path.read_text()).get("tenant")
    except ValueError as error:
        raise ValueError(f"tenants: {path}: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"tenants: {path}: needed is at least one table [[tenant]]")
    senders = tuple(_sender(path, number, table) for number, table in enumerate(tables, 1))
    if len({one.name for one in senders}) < len(senders):
        raise ValueError(f"tenants: {path}: names must differ")
    return senders


def _sender(path: Path, number: int, table: Any) -> Sender:
    known = {item.name for item in fields(Sender)}
    where = f"tenants: {path}, tenant {number}"
    if not isinstance(table, dict) or not table.keys() <= known or not {"name", "key"} <= table.keys():
        raise ValueError(f"{where}: name and key are needed, share is allowed")
    try:
        return Sender(**table)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
