"""BatchPlan: runs become segments, rows are neither lost nor invented."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.kernels.plan import BatchPlan, PlanCache, Segment

USES = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0, -2.0])), max_size=3).map(tuple)


def per_row(plan: BatchPlan) -> list[dict[int, float]]:
    rows: list[dict[int, float]] = [{} for _ in range(plan.num_rows)]
    for segment in plan.segments:
        for row in range(segment.start, segment.stop):
            assert segment.handle not in rows[row]
            rows[row][segment.handle] = segment.scale
    return rows


def summed(uses: tuple[tuple[int, float], ...]) -> dict[int, float]:
    totals = {handle: sum(scale for h, scale in uses if h == handle) for handle, _ in uses}
    return {handle: scale for handle, scale in totals.items() if scale}


@given(st.lists(USES, max_size=8))
def test_every_row_keeps_its_uses(uses: list[tuple[tuple[int, float], ...]]) -> None:
    plan = BatchPlan.from_rows(uses)
    assert plan.num_rows == len(uses)
    assert per_row(plan) == [summed(use) for use in uses]
    assert plan.handles == {handle for use in uses for handle in summed(use)}
    assert plan.is_base == (not plan.handles)


@given(st.lists(st.tuples(st.integers(0, 4), USES), max_size=6))
def test_runs_are_rows_written_short(runs: list[tuple[int, tuple[tuple[int, float], ...]]]) -> None:
    rows = [uses for length, uses in runs for _ in range(length)]
    assert BatchPlan.from_runs(runs).segments == BatchPlan.from_rows(rows).segments


@given(st.lists(USES, max_size=8))
def test_layers_cover_a_row_once_and_lose_nothing(uses: list[tuple[tuple[int, float], ...]]) -> None:
    plan = BatchPlan.from_rows(uses)
    for layer in plan.layers:
        rows = [row for segment in layer for row in range(segment.start, segment.stop)]
        assert len(rows) == len(set(rows))
    assert sorted(plan.segments, key=repr) == sorted((s for layer in plan.layers for s in layer), key=repr)


def test_neighbours_merge_and_a_shared_adapter_spans_runs() -> None:
    plan = BatchPlan.from_runs([(2, ((1, 1.0),)), (3, ((1, 1.0), (2, 0.5))), (0, ((9, 1.0),)), (1, ())])
    assert plan.segments == (Segment(0, 5, 1), Segment(2, 3, 2, 0.5))
    assert len(plan.layers) == 2
    assert plan.num_rows == 6


def test_an_adapter_that_comes_back_gets_a_second_segment() -> None:
    plan = BatchPlan.from_runs([(1, ((1, 1.0),)), (1, ()), (1, ((1, 1.0),)), (1, ((1, 2.0),))])
    assert plan.segments == (Segment(0, 1, 1), Segment(2, 1, 1), Segment(3, 1, 1, 2.0))


@pytest.mark.parametrize(
    "segment",
    [Segment(-1, 2, 0), Segment(0, 0, 0), Segment(2, 2, 0), Segment(0, 1, 0, float("nan")), Segment(0, 1, 0, 0.0)],
)
def test_segments_outside_the_batch_are_refused(segment: Segment) -> None:
    with pytest.raises(ValueError, match="segments:"):
        BatchPlan(3, (segment,))


def test_a_program_has_a_row_once() -> None:
    BatchPlan(3, (Segment(0, 2, 0), Segment(1, 2, 1), Segment(2, 1, 0)))
    with pytest.raises(ValueError, match="overlaps"):
        BatchPlan(3, (Segment(0, 2, 0), Segment(1, 2, 0)))


def test_negative_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs:"):
        BatchPlan.from_runs([(-1, ())])


def test_memo_builds_once() -> None:
    plan, built = BatchPlan(1), []
    for _ in range(2):
        assert plan.memo("key", lambda: built.append(1) or 7) == 7  # type: ignore[func-returns-value]
    assert built == [1]


def test_the_cache_returns_the_same_plan_and_keeps_only_the_latest() -> None:
    cache = PlanCache(capacity=2)
    first = cache.from_runs([(1, ((1, 1.0),))])
    assert cache.from_runs([(1, ((1, 1.0),))]) is first
    cache.from_runs([(2, ())])
    cache.from_runs([(3, ())])
    assert cache.from_runs([(1, ((1, 1.0),))]) is not first
