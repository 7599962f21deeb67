"""Arena blocks that several adapters share, found by content and counted.

A block is allocated with the first adapter that needs it and freed with the last. It may be read only once the copy
that fills it is done: whoever came second waits for the first one's copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.tiers.arena import Arena


@dataclass(slots=True, eq=False)
class SharedBlock:
    start: int
    num_elements: int
    references: int = 0
    filled: bool = False
    broken: bool = False


class SharedBlocks:
    """The book of shared blocks of one arena. Used by the engine's thread."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._blocks: dict[str, SharedBlock] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[SharedBlock]:
        return iter(self._blocks.values())

    def items(self) -> Iterable[tuple[str, SharedBlock]]:
        return self._blocks.items()

    @property
    def num_references(self) -> int:
        return sum(block.references for block in self)

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in self._blocks]

    def acquire(self, tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
        """Count a user of each; key -> start of those that it has to fill: the new ones, and those whose copy failed.
        None, and nothing changed, where the arena has no room for them."""
        new: dict[str, int] = {}
        for key in self.missing(tensors):
            start = self._arena.allocate(tensors[key].numel())
            if start is None:
                for taken in new.values():
                    self._arena.free(taken)
                return None
            new[key] = start
        self._blocks.update({key: SharedBlock(start, tensors[key].numel()) for key, start in new.items()})
        for key in tensors:
            block = self._blocks[key]
            block.references += 1
            if block.broken:  # somebody who waited for the copy still holds it
                block.filled = block.broken = False
                new[key] = block.start
        return new

    def release(self, keys: Iterable[str]) -> None:
        for key in keys:
            block = self._blocks[key]
            block.references -= 1
            if block.references == 0:
                self._arena.free(block.start)
                del self._blocks[key]

    def filled(self, keys: Iterable[str], *, broken: bool = False) -> None:
        """The copy into these blocks ended; ``broken``: it failed, and they hold anything."""
        for key in keys:
            self._blocks[key].filled, self._blocks[key].broken = True, broken

    def are_filled(self, keys: Iterable[str]) -> bool:
        return all(self._blocks[key].filled for key in keys)

    def any_broken(self, keys: Iterable[str]) -> bool:
        return any(self._blocks[key].broken for key in keys)

    def starts(self, keys: Iterable[str]) -> dict[str, int]:
        return {key: self._blocks[key].start for key in keys}
