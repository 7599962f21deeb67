"""auto follows the checkpoint, and on a CPU what the CPU can do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig

from onebase.serve.model import dtypes
from onebase.serve.model.dtypes import bfloat16_pays, pick_dtype, product_seconds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    bfloat16_pays.cache_clear()
    yield
    bfloat16_pays.cache_clear()


@pytest.mark.parametrize(("slower", "picked"), [(0.5, torch.bfloat16), (1.4, torch.bfloat16), (4.0, torch.float32)])
def test_bfloat16_is_computed_where_the_cpu_is_good_at_it(
    slower: float, picked: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "product_seconds", lambda dtype: slower if dtype is torch.bfloat16 else 1.0)
    assert pick_dtype("auto", LlamaConfig(dtype="bfloat16"), CPU) is picked
    assert pick_dtype("auto", LlamaConfig(dtype="bfloat16"), CUDA) is torch.bfloat16
    assert pick_dtype("bfloat16", LlamaConfig(dtype="bfloat16"), CPU) is torch.bfloat16


@pytest.mark.parametrize("stored", ["float32", "float16", None])
def test_other_types_are_not_measured(stored: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "product_seconds", lambda dtype: pytest.fail("measured"))
    assert pick_dtype("auto", LlamaConfig(dtype=stored), CPU) is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_takes_time(dtype: torch.dtype) -> None:
    assert product_seconds(dtype) > 0
