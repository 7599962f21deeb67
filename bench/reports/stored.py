"""Stored files of all benchmarks: one envelope, {"benchmark", "machine", ...}, as report.store writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from onebase.bench.load.result import LoadResult

_LARGEST = 1 << 30  # bytes of a file: raw requests of hours of load


class NotStored(ValueError):
    """A file is no result of a benchmark, or of another one than is asked for. The message names file and field."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One result. name: how reports call it, its file's name without suffix. data: all its fields."""

    name: str
    benchmark: str
    machine: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The machine in a line."""
        keys = ("device", "cores", "threads", "torch", "python")
        return ", ".join(
            f"{k} {self.machine[k]}" if k != "device" else str(self.machine[k]) for k in keys if k in self.machine
        )

    def load(self) -> LoadResult:
        """Raises NotStored unless it is a whole load run."""
        try:
            return msgspec.convert(self.data, LoadResult)
        except msgspec.ValidationError as error:
            raise NotStored(f"{self.name}: {error}") from None


def read(path: Path) -> Stored:
    """Raises NotStored."""
    data = _object(path)
    benchmark, machine = data.get("benchmark"), data.get("machine")
    if not isinstance(benchmark, str) or not benchmark:
        raise NotStored(f"{path}: `benchmark` must name the benchmark")
    if not isinstance(machine, dict):
        raise NotStored(f"{path}: `machine` must be an object")
    return Stored(path.stem, benchmark, machine, data)


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise NotStored(f"{path}: larger than 1 GiB")
        data = json.loads(path.read_text())
    except OSError as error:
        raise NotStored(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise NotStored(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise NotStored(f"{path}: a result is a JSON object")
    return data


def same_benchmark(first: Stored, second: Stored) -> None:
    """Raises NotStored unless both can be compared."""
    if first.benchmark != second.benchmark:
        raise NotStored(
            f"{first.name} is of `{first.benchmark}`, {second.name} of `{second.benchmark}`: only results of one "
            "benchmark can be compared"
        )


def parts(stored: Stored) -> dict[str, Stored]:
    """The results that a file of several holds, by name. Raises NotStored."""
    found = stored.data.get("parts")
    if not isinstance(found, Mapping) or not all(isinstance(part, Mapping) for part in found.values()):
        raise NotStored(f"{stored.name}: `parts` must be an object of results")
    return {name: Stored(name, str(part.get("benchmark")), stored.machine, part) for name, part in found.items()}
