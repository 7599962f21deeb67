"""What every benchmark says beside its figures: on what it ran. And how it says them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The device's name, threads and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({min(self.values):.1f} to {max(self.values):.1f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios round by round: what drifts between rounds falls out."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def show(title: str, rows: Mapping[str, str]) -> None:
    """Print a two-column table."""
    print_table(title, (), list(rows.items()))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> None:
    """By rich where it is there: machines with a GPU often have torch and little else. columns: none for no header."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, *("\t".join(row) for row in ([columns] if columns else []) + [*rows]), sep="\n")
        return
    table = Table(*(columns or [""] * len(rows[0])), title=title, show_header=bool(columns))
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def store(path: Path | None, name: str, result: Mapping[str, Any]) -> None:
    """Write the result with the machine it ran on, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmark": name, "machine": machine()} | dict(result), indent=2) + "\n")
