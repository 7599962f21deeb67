"""The largest logit of a row through integers, against torch's maximum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebase.kernels.native.library import available
from onebase.serve.engine.greedy import NOT_FINITE, greedy, greedy_by_numpy, plain_greedy

NEGATIVE_NAN = torch.tensor([-1 << 22], dtype=torch.int32).view(torch.float32).item()
SPECIAL = [math.inf, -math.inf, math.nan, NEGATIVE_NAN, 0.0, -0.0, -1e-40, 1e-40, -3.0, 3.0]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(-100, 100, width=16), st.floats(-100, -1, width=16))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = [pytest.param(greedy, id="chosen"), pytest.param(greedy_by_numpy, id="numpy")]
Way = Callable[[Tensor], Tensor]


def _hold(way: Way, logits: Tensor) -> None:
    tokens, plain = way(logits), plain_greedy(logits)
    finite = plain != NOT_FINITE
    assert torch.equal(tokens != NOT_FINITE, finite)
    rows = torch.arange(len(logits))[finite]
    assert torch.equal(logits[rows, tokens[finite]], logits[rows, plain[finite]])
    assert tokens.dtype is torch.int64


def test_there_is_a_library_to_test() -> None:
    assert available()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(VALUES, min_size=5, max_size=5), min_size=1, max_size=4))
def test_it_is_the_maximum_of_every_row(way: Way, dtype: torch.dtype, rows: list[list[float]]) -> None:
    _hold(way, torch.tensor(rows, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 1023, 1024, 1025, 5000])
def test_of_many_values_and_of_strided_rows(way: Way, dtype: torch.dtype, width: int) -> None:
    logits = torch.randn(40, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    for shift in (0.0, -50.0):
        _hold(way, logits + shift)
        _hold(way, (logits + shift)[::3])
        _hold(way, (logits + shift)[:, ::2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, NEGATIVE_NAN, math.inf])
def test_one_bad_value_is_seen_wherever_it_is(way: Way, dtype: torch.dtype, bad: float) -> None:
    logits = -torch.rand(2, 1300).to(dtype) - 1
    best = int(logits[0].argmax())
    for at in (*range(5), 1023, 1024, 1299):
        row = logits.clone()
        row[1, at] = bad
        assert way(row)[1] == NOT_FINITE
        assert way(row)[0] != NOT_FINITE
        assert logits[0, way(row)[0]] == logits[0, best]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_which_nothing_is_allowed_is_not_finite(way: Way, dtype: torch.dtype) -> None:
    assert way(torch.full((1, 3), -math.inf, dtype=dtype)).tolist() == [NOT_FINITE]
