"""How large a prompt's chunk is beside decoding sequences: by what steps cost, told to the pace here by a formula."""

from __future__ import annotations

import random

import pytest

from onebase.serve.engine.pace import FIRST_CHUNK, LEAST_CHUNK, MOST_CROWDED, Pace

BUDGET = 2048


def _seconds(decodes: int, tokens: int, *, overhead: float = 0.0) -> float:
    return (0.05 + 0.002 * decodes if decodes else 0.01) + (overhead + 0.001 * tokens if tokens else 0.0)


def _settled(pace: Pace, overhead: float = 0.0, noise: float = 0.0) -> int:
    """The allowance after some steps without a chunk, and some with one."""
    draw = random.Random(1)
    for tokens in (False,) * 20 + (True,) * 40:
        allowed = pace.allowance(15, 1, BUDGET) if tokens else 0
        seconds = _seconds(15, allowed, overhead=overhead)
        slow = 10.0 if draw.random() < noise else 1.0
        pace.observe(15, allowed, seconds * slow)
    return pace.allowance(15, 1, BUDGET)


@pytest.mark.parametrize("overhead", [0.0, 0.005])
@pytest.mark.parametrize("stretch", [1.5, 2.0, 3.0])
def test_a_step_takes_so_many_times_as_long(stretch: float, overhead: float) -> None:
    allowed = _settled(Pace(stretch), overhead)
    alone = _seconds(15, 0)
    assert _seconds(15, allowed, overhead=overhead) == pytest.approx(stretch * alone, rel=0.15)


def test_a_step_that_was_held_up_counts_for_nothing() -> None:
    assert _settled(Pace(2.0), noise=0.2) == pytest.approx(_settled(Pace(2.0)), rel=0.1)


def test_who_decodes_is_asked_for_nothing_else() -> None:
    pace = Pace(2.0)
    _settled(pace)
    assert pace.allowance(0, 1, BUDGET) == BUDGET, "nobody decodes"
    assert pace.allowance(15, 1, 5) == 5, "the token budget holds as well"
    assert Pace(0.0).allowance(15, 1, BUDGET) == BUDGET, "off"


def test_prompts_get_on_whatever_was_measured() -> None:
    pace = Pace(2.0)
    assert pace.allowance(15, 1, BUDGET) == FIRST_CHUNK
    pace.observe(15, 0, 0.001)
    for _ in range(20):
        pace.observe(15, 16, 5.0)
    assert pace.allowance(15, 1, BUDGET) == LEAST_CHUNK


def test_a_prompt_that_was_alone_says_what_a_token_takes() -> None:
    pace = Pace(2.0)
    pace.observe(0, 4, 1.0)
    assert pace.allowance(1, 1, BUDGET) == FIRST_CHUNK, "a short prompt says nothing of that"
    pace.observe(0, 1000, 1.0)
    pace.observe(1, 0, 0.05)
    assert pace.allowance(1, 1, BUDGET) == 50


def test_what_a_step_with_a_chunk_costs_at_all_is_not_put_on_its_tokens() -> None:
    pace = Pace(2.0)
    pace.observe(15, 0, 0.080)
    for tokens in (16, 48, 32, 64, 16, 48):
        pace.observe(15, tokens, 0.080 + 0.030 + 1e-4 * tokens)
    assert pace.allowance(15, 1, BUDGET) == pytest.approx((0.080 - 0.030) / 1e-4, rel=0.02)


def test_a_crowd_of_prompts_counts_as_much_as_who_decodes() -> None:
    pace = Pace(2.0)
    _settled(pace)
    one = pace.allowance(4, 1, BUDGET)
    assert pace.allowance(4, 4, BUDGET) == one
    assert pace.allowance(4, 12, BUDGET) == pytest.approx(3 * one, abs=3)
    assert pace.allowance(1, 1000, 1 << 20) == pytest.approx(MOST_CROWDED * one, abs=MOST_CROWDED)


def _told_of_rows(pace: Pace) -> None:
    """Steps without a chunk, of different numbers of sequences."""
    for decodes in (4, 8, 15, 12, 6) * 2:
        pace.observe(decodes, 0, _seconds(decodes, 0))


def test_who_sits_out_gives_its_time_to_the_prompt() -> None:
    """Its own, not that of reading the weights: the step takes no longer than one beside it would."""
    pace = Pace(2.0)
    _settled(pace)
    _told_of_rows(pace)
    beside, without = pace.allowance(15, 1, BUDGET), pace.allowance(5, 1, BUDGET, sitting_out=10)
    assert _seconds(5, without) == pytest.approx(_seconds(15, beside), rel=0.02)
    assert without > beside


def test_steps_of_other_numbers_tell_the_same_of_a_chunk() -> None:
    """Those that most sat out, and those after the load has fallen."""
    pace = Pace(2.0)
    _settled(pace)
    _told_of_rows(pace)
    settled = pace.allowance(15, 1, BUDGET)
    for tokens in (40, 60, 80, 100) * 10:
        pace.observe(2, tokens, _seconds(2, tokens))
    assert pace.allowance(15, 1, BUDGET) == pytest.approx(settled, rel=0.05)
