"""When the rows of one decode step are those of the next one. That they are made right: test_random_schedules.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from onebase.adapters.tiers.entry import Entry, State
from onebase.kernels.plan import BatchPlan
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.decode_rows import DecodeRows
from onebase.serve.engine.layout import Layout, Span
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.sequence import Sequence

from .twins import hold_twins

PAGE = 4


def _sequence(number: int, **options: Any) -> Sequence:
    """One that decodes its second token, under an adapter."""
    use = AdapterUse("digest", "path")
    sequence = Sequence.of(Request(str(number), (1, 2, 3), SamplingParams(max_tokens=9), (use,), **options), number)
    sequence.lay_out(Layout(spans=((Span(0),),)))
    sequence.adapters = (Entry("digest", "path", State.READY, handle=7),)
    sequence.tokens += [4]
    sequence.pages = [10 + number]
    sequence.num_computed = 3
    return sequence


def _step(*sequences: Sequence) -> list[Chunk]:
    return [Chunk(sequence, 1, samples=True) for sequence in sequences]


def _rows(chunks: list[Chunk]) -> DecodeRows | None:
    return DecodeRows.of(chunks, PAGE, torch.device("cpu"), BatchPlan.from_runs)


def _go_on(*sequences: Sequence) -> None:
    for sequence in sequences:
        sequence.num_computed += 1
        sequence.tokens += [5]
        if sequence.num_computed == PAGE * len(sequence.pages):
            sequence.pages += [20 + sequence.order]


def test_rows_follow_each_other_while_nothing_but_their_lengths_changes() -> None:
    pair = _sequence(0), _sequence(1)
    rows = _rows(_step(*pair))
    assert rows is not None
    for _ in range(6):
        _go_on(*pair)
        assert rows.follow(_step(*pair))
    assert not rows.follow(_step(*pair)), "the same step again"


def _preempted(one: Sequence, other: Sequence) -> list[Chunk]:
    one.pages = [*one.pages]
    return _step(one, other)


def _moved(one: Sequence, other: Sequence) -> list[Chunk]:
    one.adapters[0].handle = 8
    return _step(one, other)


def _drafted(one: Sequence, other: Sequence) -> list[Chunk]:
    return [Chunk(one, 2, samples=True, drafts=(5,)), *_step(other)]


@pytest.mark.parametrize(
    "changed",
    [
        _preempted,
        _moved,
        _drafted,
        lambda one, other: _step(one),
        lambda one, other: _step(other, one),
        lambda one, other: _step(one, other, _sequence(2)),
        lambda one, other: _step(one, _sequence(1)),
    ],
    ids=["pages", "handle", "drafts", "fewer", "order", "more", "another"],
)
def test_they_do_not_where_something_else_does(changed: Callable[[Sequence, Sequence], list[Chunk]]) -> None:
    pair = _sequence(0), _sequence(1)
    rows = _rows(_step(*pair))
    assert rows is not None
    _go_on(*pair)
    assert not rows.follow(changed(*pair))


def test_chunks_that_follow_come_in_the_order_of_the_rows() -> None:
    pair = _sequence(0), _sequence(1)
    rows = _rows(_step(*pair))
    assert rows is not None
    _go_on(*pair)
    turned = _step(*reversed(pair))
    assert rows.in_order(turned) == turned[::-1]
    assert rows.in_order(turned[:1]) is None
    assert rows.in_order([*turned, *_step(_sequence(2))]) is None
    assert rows.in_order(_step(pair[0], _sequence(1))) is None
    assert rows.in_order([Chunk(pair[0], 2, samples=True, drafts=(5,)), *_step(pair[1])]) is None


def test_others_than_decodes_are_not_taken() -> None:
    prompt, read = _sequence(0), _sequence(1, classifies=True)
    prompt.num_computed = 2
    del prompt.tokens[3:]
    assert _rows(_step(prompt)) is None, "the last token of a prompt"
    assert _rows(_step(read)) is None
    assert _rows([replace(_step(_sequence(2))[0], samples=False)]) is None


def test_a_failed_step_is_forgotten(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=64)
    driver.submit([3, 4, 5], max_tokens=20)
    for _ in range(3):
        driver.step()
    runner = driver.engine.runner
    assert runner._decodes is not None
    runner.recover()
    assert runner._decodes is None


@pytest.mark.parametrize("overlap", [False, True])
def test_most_steps_of_a_steady_batch_follow(overlap: bool, make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=64, overlap=overlap)
    held = hold_twins(driver.engine.runner)
    for number in range(5):
        driver.submit([3, 4, 5 + number], max_tokens=30)
    driver.run()
    assert sum(held) >= 24
