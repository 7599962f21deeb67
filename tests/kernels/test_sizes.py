"""The sizes are those of Triton's own functions."""

from __future__ import annotations

import pytest

from onebase.kernels.sizes import cdiv, next_power_of_2

triton = pytest.importorskip("triton")


def test_they_are_tritons() -> None:
    for count in (1, 2, 3, 15, 16, 17, 64, 100, 4096, 14336):
        assert next_power_of_2(count) == triton.next_power_of_2(count)
        assert [cdiv(count, size) for size in (1, 3, 64)] == [triton.cdiv(count, size) for size in (1, 3, 64)]
