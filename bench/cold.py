"""A cold adapter's first token, and what it is made of: its bytes read from disk, and a warm first token."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onebase.bench.drive import Driver, Job
from onebase.bench.ours import adapter_use
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.messages import UnloadAdapter

_PROMPT = tuple(range(10, 138))
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Seconds of one adapter. read: its stored bytes, from disk; cold, warm: to the first token."""

    read: float
    cold: float
    warm: float


def cold_starts(engine: Engine, folders: Sequence[Path], compiled: Path) -> list[ColdStart]:
    """Of adapters that are compiled below ``compiled``. The engine must keep no copy on the host."""
    return [_measure(engine, folder, compiled / adapter_use(folder).digest) for folder in folders]


def _measure(engine: Engine, folder: Path, compiled: Path) -> ColdStart:
    use = adapter_use(folder)
    engine.unload(UnloadAdapter("cold", use.digest))
    files = [path for path in (*compiled.rglob("*"), *folder.iterdir()) if path.is_file()]
    _drop_pages(files)
    start = time.perf_counter()
    _read([path for path in files if path.is_relative_to(compiled)])
    read = time.perf_counter() - start
    _drop_pages(files)
    job = Job(use, _PROMPT, 2)
    cold, warm = (Driver(engine, 1).run([job]).ttft(50) for _ in range(2))
    return ColdStart(read, cold, warm)


def _drop_pages(files: Iterable[Path]) -> None:
    """Out of the system's page cache: the next read comes from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(files: Iterable[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
