"""Who sits a step out for the first token of a tenant that is under its share."""

from __future__ import annotations

import pytest

from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.courtesy import SOON
from onebase.serve.engine.victims import MOST_PREEMPTIONS

from .scheduling import Steps, sequence_of


def _flooded(*, seqs: int = 5, tokens: int = 16, priority: int = 0) -> Steps:
    """Four sequences of a flood decode."""
    steps = Steps(tokens=tokens, seqs=seqs)
    flood = [sequence_of(order, max_tokens=50, tenant="flood", priority=priority) for order in range(4)]
    steps.add(*flood)
    steps.step()
    assert _tenants(steps.step()) == ["flood"] * 4
    return steps


def _tenants(chunks: list[Chunk]) -> list[str]:
    return [chunk.sequence.request.tenant for chunk in chunks]


def test_a_prompt_has_the_step_of_those_over_their_share() -> None:
    steps = _flooded()
    steps.add(sequence_of(9, 16, tenant="small"))
    assert _tenants(steps.step()) == ["small"], "the whole budget is the prompt's"
    assert _tenants(steps.step()) == ["flood"] * 4 + ["small"]


def test_nobody_sits_out_two_steps_in_a_row() -> None:
    steps = _flooded()
    steps.add(sequence_of(9, 60, tenant="small"))
    told = [_tenants(steps.step()) for _ in range(5)]
    assert told == [["small"], ["flood"] * 4 + ["small"]] * 2 + [["small"]]
    steps.run()
    assert len(steps.finished) == 5


def test_it_holds_for_a_prompt_that_needs_a_seat_as_well() -> None:
    steps = _flooded(seqs=4)
    steps.add(sequence_of(9, 8, tenant="small"))
    assert _tenants(steps.step()) == ["small"]
    assert steps.scheduler.preemptions == 1


def test_who_sits_out_for_nobody_does_not() -> None:
    """The prompt has a claim on a seat, but everybody has given way often enough."""
    steps = _flooded(seqs=4)
    for one in steps.scheduler.running:
        one.preemptions = MOST_PREEMPTIONS
    steps.add(sequence_of(9, 8, tenant="small"))
    assert [_tenants(steps.step()) for _ in range(3)] == [["flood"] * 4] * 3


def test_a_step_keeps_its_budget_where_a_prompt_takes_the_seat_of_one_that_decodes() -> None:
    """One chunk goes and one comes: the prompt took the time all the same."""
    steps = Steps(tokens=16, seqs=4)
    steps.add(*(sequence_of(order, 2, max_tokens=50, tenant="flood") for order in range(3)))
    steps.add(sequence_of(3, 2, max_tokens=50, tenant="patient", priority=5))
    steps.step()
    steps.add(sequence_of(9, 40, tenant="small"))
    chunks = steps.step()
    assert _tenants(chunks) == ["small"]
    assert steps.scheduler.preemptions == 1
    assert sum(chunk.num_tokens for chunk in chunks) <= 16


@pytest.mark.parametrize("case", ["alone", "urgent", "absent", "at its share", "one seat"])
def test_everybody_goes_on(case: str) -> None:
    """Where there is no such prompt, or nobody who could make way."""
    steps = _flooded(priority=-1 if case == "urgent" else 0)
    if case == "absent":
        steps.absent.add("far")
        steps.add(sequence_of(9, 8, "far", tenant="small"))
    elif case == "at its share":
        steps = Steps(tokens=16, seqs=8)
        steps.add(*(sequence_of(order, 2, max_tokens=50, tenant="flood") for order in range(4)))
        steps.step()
        steps.add(sequence_of(9, 8, tenant="small"))
    elif case == "one seat":
        steps = Steps(tokens=16, seqs=2)
        steps.add(*(sequence_of(order, 2, max_tokens=50, tenant=f"t{order}") for order in range(2)))
        steps.step()
        steps.add(sequence_of(9, 8, tenant="small"))
    else:
        steps.add(sequence_of(9, 8, tenant="flood" if case == "alone" else "small"))
    going_on = [one for one in steps.scheduler.running if one.num_computed]
    told = [chunk.sequence for chunk in steps.step()]
    assert [one for one in told if one in going_on] == going_on, case


def test_a_prompt_that_will_soon_end_keeps_its_turn() -> None:
    """By turns both would end when the second one does."""
    steps = Steps(tokens=8, seqs=4)
    steps.add(*(sequence_of(order, 8 * (1 + SOON), tenant=tenant) for order, tenant in enumerate("ab")))
    told = [_tenants(steps.step()) for _ in range(2 * (1 + SOON))]
    assert told == [["a"]] * (1 + SOON) + [["a", "b"]] * (1 + SOON)


def test_a_long_one_goes_by_the_counters() -> None:
    steps = Steps(tokens=8, seqs=4)
    steps.add(*(sequence_of(order, 80, tenant=tenant) for order, tenant in enumerate("ab")))
    told = [_tenants(steps.step()) for _ in range(8)]
    assert told == [["a"], ["b"]] * 4


def test_a_flood_has_no_turn_to_keep() -> None:
    steps = Steps(tokens=8, seqs=3)
    steps.add(sequence_of(0, 4, max_tokens=50, tenant="flood"), sequence_of(1, 400, tenant="flood"))
    for _ in range(3):
        steps.step()
    steps.add(sequence_of(9, 8, tenant="small"))
    told = [_tenants(steps.step()) for _ in range(2)]
    assert "small" in told[1], "at its arrival its counter is the flood's, and one chunk later less"
