"""A step that raised: what it was, and how many tokens the next ones may have.

What does not fit, or fails, is run again in halves (pipeline.py), down to the request that cannot run alone: that one
is told why, and nobody else. Pages are a fixed room, so preempting would free nothing that a forward can use.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from onebase.adapters.errors import EngineError, OutOfMemory

CALM = 64  # steps that went well after which they may be twice as large again
_log = logging.getLogger("onebase.engine")
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a forward raised. It does not hold the exception, whose frames would keep the forward's tensors alive."""

    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        if is_out_of_memory(error):
            _log.warning("a step is out of memory and is run again in parts: %s", error)
            return cls(out_of_memory=True)
        _log.error("a step failed and is run again in parts", exc_info=error)
        return cls(out_of_memory=False)

    def told(self) -> EngineError:
        """What a request that fails alone is told."""
        if self.out_of_memory:
            return OutOfMemory("out of memory: the device has no room for a step of this request alone")
        return EngineError("the model's forward failed on this request; the server's log has the details")


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU or of the host: torch's allocator for CPUs says it in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


class TokenLimit:
    """Tokens that a step may have: ``now``, at most ``most``. Half of a step that did not fit, for a while."""

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._calm = 0

    def shrink(self, num_tokens: int) -> None:
        """A step of so many tokens did not fit."""
        self.now = max(1, min(self.now, num_tokens // 2))
        self._calm = 0

    def grow(self) -> None:
        """A step went well."""
        if self.now < self.most:
            self._calm += 1
            if self._calm == CALM:
                self.now, self._calm = min(self.most, 2 * self.now), 0
