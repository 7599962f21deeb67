"""A saved copy of the base's embedding is accepted where it is equal, and never moved to the device whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import keys

ROWS = 10_000


def take(copy: torch.Tensor, weight: torch.Tensor) -> None:
    tensors: Any = SimpleNamespace(shape=lambda key: tuple(copy.shape), take=lambda key: copy)
    base: Any = SimpleNamespace(weight=lambda path: weight)
    keys.take_base_copy("model.embed.weight", tensors, base, "model.embed")


def test_an_equal_copy_is_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: seen.append(len(self)) or real(self, *a, **k))
    weight = torch.randn(ROWS, 4).bfloat16()
    take(weight.float(), weight)
    assert sum(seen) == ROWS
    assert max(seen) <= 4096


@pytest.mark.parametrize("row", [0, 4095, 4096, ROWS - 1])
def test_one_number_that_differs_refuses_it(row: int) -> None:
    weight = torch.zeros(ROWS, 4)
    copy = weight.clone()
    copy[row, 3] = 1
    with pytest.raises(AdapterRejected, match=r"model\.embed\.weight"):
        take(copy, weight)


@pytest.mark.parametrize("rows", [ROWS + 1, ROWS - 1, 1])
def test_a_resized_copy_is_refused(rows: int) -> None:
    """Also one that was shrunk, whose rows are all the base's."""
    with pytest.raises(AdapterRejected, match="resized") as refused:
        take(torch.zeros(rows, 4), torch.zeros(ROWS, 4))
    assert refused.value.param == "model.embed.weight"
