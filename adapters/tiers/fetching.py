"""Brings an adapter to host memory, in a loader thread: from its compiled form, or from its files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from onebase.adapters.packing import PackedProgram, pack
from onebase.adapters.program import AdapterProgram
from onebase.adapters.tiers.compiled import CompiledForms
from onebase.adapters.tiers.meters import LoadStep

Compile = Callable[[Path, str], AdapterProgram]  # (blob folder, digest) -> program; raises AdapterError


@dataclass(frozen=True, slots=True)
class Fetched:
    """A packed program, and which step it took how many seconds to make."""

    packed: PackedProgram
    step: LoadStep
    seconds: float


class Fetcher:
    """forms: None where nothing is kept on disk. dtype: the arena's. pinned: into page-locked memory."""

    def __init__(self, compile: Compile, forms: CompiledForms | None, dtype: torch.dtype, *, pinned: bool) -> None:
        self.compile = compile
        self._forms = forms
        self._dtype = dtype
        self._pinned = pinned

    def fetch(self, path: Path, digest: str) -> Fetched:
        """Raises AdapterError. What was compiled is on disk as well when this returns."""
        start = time.monotonic()
        packed = None if self._forms is None else self._forms.read(digest)
        if packed is not None:
            return Fetched(packed, "read", time.monotonic() - start)
        packed = pack(self.compile(path, digest), self._dtype, pinned=self._pinned)
        if self._forms is not None:
            self._forms.write(packed)
        return Fetched(packed, "compile", time.monotonic() - start)
