"""The largest logit of a row through integers, against torch's maximum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebase.serve.engine.greedy import greedy, plain_greedy

NEGATIVE_NAN = torch.tensor([-1 << 22], dtype=torch.int32).view(torch.float32).item()
SPECIAL = [math.inf, -math.inf, math.nan, NEGATIVE_NAN, 0.0, -0.0, -1e-40, 1e-40, -3.0, 3.0]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(-100, 100, width=16), st.floats(-100, -1, width=16))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _hold(logits: Tensor) -> None:
    tokens, finite = greedy(logits)
    plain, expected = plain_greedy(logits)
    assert torch.equal(finite, expected)
    rows = torch.arange(len(logits))[finite]
    assert torch.equal(logits[rows, tokens[finite]], logits[rows, plain[finite]])
    assert tokens.dtype is torch.int64


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(VALUES, min_size=5, max_size=5), min_size=1, max_size=4))
def test_it_is_the_maximum_of_every_row(dtype: torch.dtype, rows: list[list[float]]) -> None:
    _hold(torch.tensor(rows, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_many_values_and_of_strided_rows(dtype: torch.dtype) -> None:
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
    for shift in (0.0, -50.0):
        _hold(logits + shift)
        _hold((logits + shift)[::3])
        _hold((logits + shift)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, NEGATIVE_NAN, math.inf])
def test_one_bad_value_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    logits = -torch.rand(2, 9).to(dtype) - 1
    for at in range(9):
        row = logits.clone()
        row[1, at] = bad
        assert greedy(row)[1].tolist() == [True, False]


def test_a_row_of_which_nothing_is_allowed_is_not_finite() -> None:
    assert greedy(torch.full((1, 3), -math.inf))[1].tolist() == [False]
