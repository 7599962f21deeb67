"""Requests -> measures, over all of them and by adapter and tenant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate

import numpy as np

from onebase.bench.load.result import Measures, RequestRecord, Stats, Summary
from onebase.bench.load.slo import Slo

Window = tuple[float, float]


def summarise(records: Sequence[RequestRecord], slo: Slo, window: Window) -> Summary:
    """window: seconds since the start; requests due outside of it are measured by the tokens that came inside alone."""
    whole = _measures(records, slo, window)
    return Summary(
        **{item.name: getattr(whole, item.name) for item in fields(Measures)},
        window=window,
        per_adapter=_grouped(records, slo, window, lambda record: record.adapter),
        per_tenant=_grouped(records, slo, window, lambda record: record.tenant),
    )


def stats(values: Iterable[float | None]) -> Stats | None:
    """None of them: values that are not there are left out."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return None
    return Stats(float(known.mean()), *map(float, np.percentile(known, (50, 90, 95, 99))))


def _grouped(
    records: Sequence[RequestRecord], slo: Slo, window: Window, key: Callable[[RequestRecord], str]
) -> Mapping[str, Measures]:
    groups: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return {name: _measures(groups[name], slo, window) for name in sorted(groups)}


def _measures(records: Sequence[RequestRecord], slo: Slo, window: Window) -> Measures:
    start, end = window
    seconds = max(end - start, 1e-9)
    offered = [record for record in records if start <= record.at < end]
    good = sum(slo.met(record) for record in offered)
    answered = sum(record.status == "ok" and start <= (record.ends or record.sent) <= end for record in records)
    count = {status: sum(record.status == status for record in offered) for status in _STATUSES}
    return Measures(
        offered=len(offered),
        **count,
        tokens_per_second=sum(_tokens_in(record, window) for record in records) / seconds,
        requests_per_second=answered / seconds,
        goodput=good / seconds,
        attainment=good / len(offered) if offered else 0.0,
        ttft=stats(record.ttft for record in offered),
        tpot=stats(record.tpot for record in offered),
        itl=stats(gap for record in offered for gap in record.gaps),
        e2e=stats(record.e2e for record in offered),
    )


_STATUSES = ("ok", "rejected", "failed", "cancelled")


def _tokens_in(record: RequestRecord, window: Window) -> float:
    """Tokens that came inside the window: all pieces of a request count alike."""
    if record.first is None or record.ends is None:
        return 0.0
    start, end = window
    if start <= record.first and record.ends <= end:
        return record.tokens_out
    times = accumulate(record.gaps, initial=record.first)
    inside = sum(start <= time <= end for time in times)
    return record.tokens_out * inside / (len(record.gaps) + 1)
