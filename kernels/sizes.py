"""Sizes of grids and blocks. Triton's own functions for them are also its compiler's, and cost each launch as much as
the rest of its arguments."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """Blocks of a size that hold so many."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least one that holds ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()
