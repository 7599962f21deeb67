"""Fair sharing: who is served next, what a flood may take, and that nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.serve.engine.backlog import AGED
from onebase.serve.engine.fairness import OUTPUT_WEIGHT, Fairness
from onebase.serve.engine.victims import MOST_PREEMPTIONS

from .scheduling import Steps, sequence_of

# Virtual token counters


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(1, 12)), min_size=30, max_size=80),
    tokens=st.sampled_from([8, 24, 64]),
    seqs=st.integers(1, 6),
    weights=st.sampled_from([{}, {"a": 2.0}, {"a": 3.0, "b": 0.5}]),
)
def test_backlogged_tenants_are_served_alike(
    jobs: list[tuple[str, int, int]], tokens: int, seqs: int, weights: dict[str, float]
) -> None:
    """Theorem 4.4 of the paper: while two tenants wait all the time, what they are served, by weight, differs by no
    more than twice what one step, or all sequences that run at once, can take."""
    steps = Steps(tokens=tokens, seqs=seqs, weights=weights)
    for order, (tenant, length, out) in enumerate(jobs):
        steps.add(sequence_of(order, length, max_tokens=out, tenant=tenant))
    most_input, most_output = 30, seqs * 12
    bound = 2 * max(most_input, OUTPUT_WEIGHT * most_output, tokens) / min([1.0, *weights.values()])
    backlogged = set(steps.scheduler.waiting.tenants)
    while len(backlogged) > 1:
        steps.step()
        still = backlogged & set(steps.scheduler.waiting.tenants)
        served = {name: steps.served.get(name, 0.0) / steps.fairness.weight(name) for name in still}
        assert max(served.values(), default=0) - min(served.values(), default=0) <= bound
        backlogged = still
    steps.run()
    assert len(steps.finished) == len(jobs)


def test_weights_are_shares() -> None:
    steps = Steps(tokens=16, seqs=4, weights={"big": 3.0})
    for order in range(400):
        steps.add(sequence_of(order, 8, max_tokens=8, tenant="big" if order % 2 else "small"))
    for _ in range(120):
        steps.step()
    assert 2.4 < steps.served["big"] / steps.served["small"] < 3.6


def test_who_comes_back_is_owed_nothing() -> None:
    """It does not hold up the others for what it did not use; nor is its debt forgotten."""
    fairness = Fairness()
    ours, theirs, late = sequence_of(0, tenant="ours"), sequence_of(1, tenant="theirs"), sequence_of(2, tenant="late")
    fairness.enter(ours)
    fairness.enter(theirs)
    fairness.charge(ours, 100, 0)
    fairness.charge(theirs, 70, 0)
    fairness.enter(late)
    assert fairness.served(late)[0] == 70
    fairness.leave(ours)
    again = sequence_of(3, tenant="ours")
    fairness.enter(again)
    assert fairness.served(again)[0] == 100
    fairness.check([theirs, late, again])


def test_after_silence_the_counter_is_that_of_who_left_last() -> None:
    fairness = Fairness()
    first = sequence_of(0, tenant="first")
    fairness.enter(first)
    fairness.charge(first, 50, 0)
    fairness.leave(first)
    second = sequence_of(1, tenant="second")
    fairness.enter(second)
    assert fairness.served(second)[0] == 50


def test_the_adapters_of_a_tenant_share_what_it_has() -> None:
    steps = Steps(tokens=16, seqs=2)
    for order in range(40):
        steps.add(sequence_of(order, 8, "popular", max_tokens=4))
    steps.add(sequence_of(40, 8, "rare", max_tokens=4))
    steps.run(until=lambda: any(one.digests == ("rare",) for one in steps.finished))
    assert len(steps.finished) <= 6
    steps.run()


def test_what_is_computed_again_is_not_charged_again() -> None:
    steps = Steps(num_pages=6, tokens=64, seqs=4, caching=False)
    steps.add(*(sequence_of(order, 6, max_tokens=10) for order in range(3)))
    other = sequence_of(3, 1, max_tokens=1)
    steps.add(other)
    steps.run(until=lambda: steps.scheduler.preemptions >= 2)
    running = [*steps.scheduler.running, *steps.scheduler.waiting]
    steps.run()
    assert running
    assert steps.fairness._accounts[""].served == pytest.approx(3 * (6 + 2 * 10) + 1 + 2, abs=2 * 4)


# A flood


def test_a_flood_gives_a_seat_to_whoever_has_none() -> None:
    """All seats are taken by long answers of one tenant: another one's request starts in the next step, and the
    flood's youngest comes back when there is room."""
    steps = Steps(tokens=64, seqs=4)
    steps.add(*(sequence_of(order, 4, max_tokens=200, tenant="flood") for order in range(12)))
    for _ in range(20):
        steps.step()
    youngest = steps.scheduler.running[-1]
    small = sequence_of(20, 4, max_tokens=4, tenant="small")
    steps.add(small)
    assert small in [chunk.sequence for chunk in steps.step()]
    assert youngest not in steps.scheduler.running
    assert youngest.preemptions == 1
    assert len(youngest.tokens) > 4, "what was generated is kept"
    steps.run(until=lambda: small in steps.finished, most=5)
    steps.step()
    assert youngest in steps.scheduler.running


def test_seats_go_by_share_and_stay_there() -> None:
    """Two tenants with endless answers: each has half of the seats after a few steps, and nobody is preempted from
    then on."""
    steps = Steps(tokens=64, seqs=8)
    steps.add(*(sequence_of(order, 4, max_tokens=500, tenant="flood") for order in range(16)))
    for _ in range(20):
        steps.step()
    steps.add(*(sequence_of(20 + order, 4, max_tokens=500, tenant="other") for order in range(16)))
    for _ in range(20):
        steps.step()
    held = [sequence.request.tenant for sequence in steps.scheduler.running]
    assert held.count("flood") == held.count("other") == 4
    before = steps.scheduler.preemptions
    for _ in range(100):
        steps.step()
    assert steps.scheduler.preemptions == before == 4


def test_a_flood_gives_pages_to_whoever_has_none() -> None:
    steps = Steps(num_pages=40, tokens=64, seqs=16)
    steps.add(*(sequence_of(order, 30, max_tokens=60, tenant="flood") for order in range(8)))
    for _ in range(10):
        steps.step()
    small = sequence_of(20, 40, max_tokens=4, tenant="small")
    steps.add(small)
    steps.run(until=lambda: small in steps.finished, most=16)
    assert steps.scheduler.preemptions


def test_the_prompts_of_a_flood_do_not_hold_up_a_short_one() -> None:
    """A chunk of a long prompt is computed in each step; a tenant that was served less comes between."""
    steps = Steps(tokens=8, seqs=4)
    steps.add(sequence_of(0, 200, tenant="flood"), sequence_of(1, 200, tenant="flood"))
    for _ in range(3):
        steps.step()
    small = sequence_of(2, 6, max_tokens=1, tenant="small")
    steps.add(small)
    steps.run(until=lambda: small in steps.finished, most=3)


def test_one_tenant_alone_is_never_preempted_for_a_seat() -> None:
    steps = Steps(tokens=64, seqs=2)
    steps.add(*(sequence_of(order, 4, max_tokens=50) for order in range(6)))
    steps.run()
    assert steps.scheduler.preemptions == 0


# Priorities


def test_the_lower_priority_starts_first_and_takes_seats() -> None:
    steps = Steps(seqs=2)
    steps.add(*(sequence_of(order, max_tokens=100, priority=5) for order in range(4)))
    steps.step()
    urgent = sequence_of(9, max_tokens=3, priority=-1)
    steps.add(sequence_of(8, max_tokens=3, priority=5), urgent)
    assert urgent in [chunk.sequence for chunk in steps.step()]
    steps.run()
    assert steps.finished[0] is urgent


def test_nobody_starves_behind_more_urgent_ones() -> None:
    """A stream of urgent requests never ends; the one that waits runs to its end all the same."""
    steps = Steps(seqs=2)
    patient = sequence_of(0, max_tokens=10, priority=9)
    steps.add(patient)
    order = 0
    while patient not in steps.finished:
        while len(steps.scheduler.waiting) < 5:
            order += 1
            steps.add(sequence_of(order, max_tokens=2, priority=0))
        steps.step()
        assert order < 20 * AGED, "it starves"
    assert patient.preemptions <= MOST_PREEMPTIONS


def test_a_prompt_that_is_begun_gets_on_beside_more_urgent_ones() -> None:
    """Urgent prompts could take every step whole: seats are free, since nothing is generated after them."""
    steps = Steps(tokens=16, seqs=8)
    patient = sequence_of(0, 100, max_tokens=2, priority=9)
    steps.add(patient)
    steps.step()
    order = 0
    while patient not in steps.finished:
        while len(steps.scheduler.waiting) < 3:
            order += 1
            steps.add(sequence_of(order, 16, max_tokens=1, priority=0))
        steps.step()
        assert order < 20 * AGED, "it starves"
    assert order > 5 * AGED, "the urgent ones had most of the steps"


def test_an_urgent_one_takes_a_seat_also_while_an_old_one_waits_for_its_turn() -> None:
    steps = Steps(seqs=2)
    steps.add(*(sequence_of(order, max_tokens=1, priority=5) for order in range(AGED - 3)))
    steps.run()
    steps.add(*(sequence_of(order, max_tokens=300, priority=5) for order in range(20, 23)))
    steps.step()
    urgent = sequence_of(30, max_tokens=3, priority=0)
    steps.add(urgent)
    assert urgent in [chunk.sequence for chunk in steps.step()]


def test_after_the_turn_of_the_oldest_the_most_urgent_starts() -> None:
    steps = Steps(tokens=64, seqs=16)
    steps.add(*(sequence_of(order, max_tokens=1, priority=5) for order in range(AGED)))
    steps.run()
    old = [sequence_of(20 + order, priority=7) for order in range(3)]
    urgent = [sequence_of(30 + order, priority=order % 3) for order in range(9)]
    steps.add(*old, *urgent)
    started = [chunk.sequence for chunk in steps.step()]
    assert started == [old[0], *sorted(urgent, key=lambda one: (one.request.priority, one.order)), *old[1:]]


def test_a_step_ranks_no_more_priorities_than_it_needs() -> None:
    """Clients choose their priorities: thousands of them must not cost a step anything."""
    steps = Steps(seqs=4)
    steps.add(*(sequence_of(order, priority=10_000 - order, max_tokens=50) for order in range(2000)))
    ranked: list[object] = []
    served = steps.fairness.served
    steps.fairness.served = lambda one: ranked.append(one) or served(one)  # type: ignore[method-assign, func-returns-value]
    for _ in range(5):
        chunks = steps.scheduler.schedule(lambda _: True, lambda _: None, lambda _: None)
        steps.scheduler.computed(chunks)
        for chunk in chunks:
            chunk.sequence.tokens.append(1)
    assert len(steps.scheduler.running) == 4
    assert len(ranked) < 100


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.integers(1, 12),
            st.sampled_from("abc"),
            st.integers(-1, 2),
            st.sampled_from(["", "x"]),
        ),
        min_size=1,
        max_size=20,
    ),
    num_pages=st.integers(9, 20),
    tokens=st.integers(1, 24),
    seqs=st.integers(1, 5),
    caching=st.booleans(),
)
def test_everyone_finishes_whatever_the_tenants_and_priorities(
    jobs: list[tuple[int, int, str, int, str]], num_pages: int, tokens: int, seqs: int, caching: bool
) -> None:
    steps = Steps(num_pages, tokens, seqs, caching=caching)
    for order, (length, out, tenant, priority, adapter) in enumerate(jobs):
        prompt = range(length)  # they all begin alike
        steps.add(sequence_of(order, prompt, adapter, max_tokens=out, tenant=tenant, priority=priority))
        steps.step()
    steps.run()
    assert len(steps.finished) == len(jobs)
    assert steps.scheduler.pages.num_free == num_pages
    assert not steps.fairness.active


def test_none_is_preempted_for_ever() -> None:
    """Pages for two of them, and a stream of others of a tenant that has less."""
    steps = Steps(num_pages=12, tokens=64, seqs=4, caching=False)
    patient = sequence_of(0, 8, max_tokens=30, tenant="flood")
    steps.add(patient, *(sequence_of(order, 8, max_tokens=30, tenant="flood") for order in range(1, 4)))
    order = 4
    for _ in range(600):
        if patient in steps.finished:
            break
        if len(steps.scheduler.waiting) < 3:
            steps.add(sequence_of(order, 8, max_tokens=6, tenant=f"t{order % 5}"))
            order += 1
        steps.step()
    assert patient in steps.finished
    steps.run()
    assert max(one.preemptions for one in steps.finished) <= MOST_PREEMPTIONS + 4


# What a step costs


def test_a_step_asks_only_those_that_could_start() -> None:
    """Thousands wait for adapters that are not there: none of them is asked, and few of those that wait for a seat."""
    steps = Steps(seqs=4)
    steps.scheduler.ready = {"here"}
    for order in range(2000):
        steps.add(sequence_of(order, 4, f"away{order % 700}", tenant=f"t{order % 3}"))
    for order in range(2000, 2400):
        steps.add(sequence_of(order, 4, "here", max_tokens=40))
    asked: list[str] = []

    def may_start(sequence: object) -> bool:
        asked.append(sequence.id)  # type: ignore[attr-defined]
        return True

    for _ in range(10):
        for chunk in steps.scheduler.schedule(may_start, lambda _: None, lambda _: None):
            steps.scheduler.computed([chunk])
            chunk.sequence.tokens.append(1)
    assert list(dict.fromkeys(asked)) == [f"s{order}" for order in range(2000, 2005)], "the last one found no seat"
    assert len(asked) == 4 * 2 + 1, "who has a seat and pages is asked again"


def test_turns_go_round_the_tenants() -> None:
    steps = Steps()
    for order in range(300):
        steps.add(sequence_of(order, 4, f"a{order}", tenant="flood"))
    steps.add(sequence_of(300, 4, "b0", tenant="small"), sequence_of(301, 4, "b0", tenant="small"))
    first = steps.scheduler.waiting.longest_waiting(4)
    assert [one.digests[0] for one in first] == ["a0", "b0", "a1", "a2"]
    steps.scheduler.finish(first[0])
    assert [one.digests[0] for one in steps.scheduler.waiting.longest_waiting(3)] == ["a1", "b0", "a2"]
    steps.scheduler.check()
