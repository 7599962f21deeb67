"""Requests that begin alike and arrive together: what they share is computed once, for one tenant and one salt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.serve.engine.messages import Request, SamplingParams, TokenOutput

from .scheduling import PAGE, Steps, sequence_of

PREFIX = tuple(range(5000, 5040))  # ten pages


def _computed(steps: Steps) -> int:
    """Tokens of prompts that go through the model until nobody is left."""
    steps.run()
    return steps.prompt_tokens


def _crowd(count: int, **request: Any) -> list[Any]:
    return [
        sequence_of(order, (*PREFIX, order, order + 1, order + 2), max_tokens=2, **request) for order in range(count)
    ]


@pytest.mark.parametrize("tokens", [8, 48, 500])
def test_one_computes_what_all_share(tokens: int) -> None:
    steps = Steps(tokens=tokens, seqs=16)
    steps.add(*_crowd(40))
    assert _computed(steps) == len(PREFIX) + 40 * 3
    assert len(steps.finished) == 40
    assert [one.num_given for one in steps.finished] == [0] + 39 * [len(PREFIX)]
    assert steps.scheduler.cached_tokens == 39 * len(PREFIX)


def test_without_the_cache_everyone_computes_it() -> None:
    steps = Steps(seqs=16, caching=False)
    steps.add(*_crowd(4))
    assert _computed(steps) == 4 * (len(PREFIX) + 3)


def test_tenants_salts_and_adapters_share_nothing() -> None:
    for others in ({"tenant": "b"}, {"cache_salt": "b"}, {"adapter": "b"}):
        steps = Steps(seqs=16)
        steps.add(*_crowd(1), *(sequence_of(order, (*PREFIX, 1, 2, 3), max_tokens=2, **others) for order in (1, 2)))
        assert _computed(steps) == 2 * (len(PREFIX) + 3) + 3, others
        assert sorted(one.num_given for one in steps.finished) == [0, 0, len(PREFIX)]


def test_a_salt_is_not_a_tenant() -> None:
    """Whatever the names: no two (tenant, salt) have one root."""
    pairs = [("a", ""), ("", "a"), ("a', '", ""), ("a", "', '"), ("ab", ""), ("a", "b"), ("", "ab")]
    steps = Steps(seqs=16)
    crowd = [sequence_of(at, PREFIX, max_tokens=1, tenant=who, cache_salt=salt) for at, (who, salt) in enumerate(pairs)]
    steps.add(*crowd)
    assert _computed(steps) == len(pairs) * len(PREFIX)


def test_a_short_common_beginning_is_not_waited_for() -> None:
    steps = Steps(tokens=500, seqs=16)
    steps.add(*(sequence_of(order, (*PREFIX[:PAGE], *range(100 * order, 100 * order + 40))) for order in range(1, 9)))
    assert len(steps.step()) == 8


def test_followers_come_back_when_their_leader_goes() -> None:
    steps = Steps(tokens=64, seqs=16)
    crowd = _crowd(20)
    steps.add(*crowd)
    steps.scheduler.schedule(lambda _: True, lambda _: None, lambda _: None)
    steps.scheduler.check()
    assert [one.order for one in steps.scheduler.waiting.aside] == list(range(1, 17)), "no more than that in a step"
    steps.scheduler.finish(crowd[2])
    steps.scheduler.finish(crowd[0])
    assert not steps.scheduler.waiting.aside
    steps.scheduler.check()
    steps.step()
    assert steps.scheduler.running == [crowd[1]]
    steps.run()
    assert len(steps.finished) == 18


@settings(max_examples=80, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(1, 6), st.sampled_from(["", "t"]), st.booleans()),
        min_size=1,
        max_size=24,
    ),
    num_pages=st.integers(14, 40),
    tokens=st.integers(3, 40),
    seqs=st.integers(1, 6),
)
def test_nobody_waits_for_ever(
    jobs: list[tuple[int, int, int, str, bool]], num_pages: int, tokens: int, seqs: int
) -> None:
    """Beginnings of all lengths, few pages, leaders that are preempted or aborted."""
    steps = Steps(num_pages, tokens, seqs)
    gone = 0
    for order, (pages, branch, out, tenant, aborted) in enumerate(jobs):
        prompt = (*PREFIX[: PAGE * pages], *(10 * branch + at for at in range(3)))
        one = sequence_of(order, prompt, max_tokens=out, tenant=tenant)
        steps.add(one)
        steps.step()
        if aborted and one not in steps.finished:
            steps.scheduler.finish(one)
            steps.scheduler.check()
            gone += 1
    steps.run()
    assert len(steps.finished) == len(jobs) - gone
    assert steps.scheduler.pages.num_free == num_pages


def test_cached_tokens_are_those_of_others(make_driver: Callable[..., Any]) -> None:
    """A request that is preempted finds its own pages again; they are not what the cache gave it."""
    driver = make_driver("llama", kv_memory=0.0000305, max_model_len=40, page_size=8)  # a few pages
    told: dict[str, int] = {}
    for at in range(6):
        sampling = SamplingParams(16, temperature=0.0, ignore_eos=True)
        driver.engine.add(Request(f"r{at}", tuple(range(10 * at + 3, 10 * at + 20)), sampling))
    while driver.engine.has_work:
        for output in driver.engine.step():
            assert isinstance(output, TokenOutput), output
            told[output.id] = told.get(output.id, 0) + output.cached_tokens
        driver.engine.check()
    assert driver.engine.scheduler.preemptions > 0
    assert set(told.values()) == {0}
