"""The batches of decode steps that follow each other, against each of them built by itself."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebase.kernels.attention import AttentionBatch
from onebase.kernels.decode_tables import DecodeTables

CPU = torch.device("cpu")


def _assert_equal(found: AttentionBatch, plain: AttentionBatch) -> None:
    for field in fields(plain):
        mine, theirs = getattr(found, field.name), getattr(plain, field.name)
        if isinstance(theirs, Tensor):
            assert mine.dtype is theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name
        elif isinstance(theirs, np.ndarray):
            assert np.array_equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.sampled_from([1, 3, 4, 16]), st.integers(0, 40))
def test_each_is_as_if_it_were_built_by_itself(lengths: list[int], page_size: int, steps: int) -> None:
    pages = [list(range(1000 * row, 1000 * row + -(-length // page_size))) for row, length in enumerate(lengths)]
    tables = DecodeTables(lengths, pages, page_size, CPU)
    ones = [1] * len(lengths)
    _assert_equal(tables.batch(), AttentionBatch.build(ones, lengths, pages, page_size, CPU))
    for _ in range(steps):
        lengths = [length + 1 for length in lengths]
        for row, length in enumerate(lengths):
            if length > page_size * len(pages[row]):  # as late as a scheduler gives them
                pages[row].append(1000 * row + 500 + len(pages[row]))
        tables.advance()
        _assert_equal(tables.batch(), AttentionBatch.build(ones, lengths, pages, page_size, CPU))


def test_pages_beyond_those_that_are_needed_are_not_in_the_tables() -> None:
    tables = DecodeTables([5], [[7, 3, 9, 8]], 4, CPU)
    assert tables.batch().block_tables.tolist() == [[7, 3]]


def test_slots_beyond_int32() -> None:
    tables = DecodeTables([129], [[0, 2**28]], 128, CPU)
    tables.advance()
    assert tables.batch().slots.tolist() == [2**35 + 1]


@pytest.mark.gpu
def test_a_batch_on_a_gpu_stays_as_it_was() -> None:
    tables = DecodeTables([5, 8], [[7, 3], [1, 2, 4]], 4, torch.device("cuda"))
    first = tables.batch()
    tables.advance()
    assert first.kv_lens_device.tolist() == [5, 8]
    assert first.slots.tolist() == [12, 11]
    assert tables.batch().slots.tolist() == [13, 16]
